"""What `--policy` accepts: a policy's text, or the path of a file that `kvx.save_policy` wrote."""

from os.path import isfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvx.policy import Policy

HELP = "A policy such as 'snapkv(budget=0.25)+kivi(bits=2)' (see `kvx policies`), or a file of `kvx.save_policy`."


def policy_argument(text: str) -> "Policy":
    """The policy that a user means.

    Raises:
        BadInput: neither text that describes a policy nor a policy's file.
    """
    from kvx.policy_files import load_policy
    from kvx.policy_text import parse_policy

    if text.endswith(".safetensors") or isfile(text):
        return load_policy(text)
    return parse_policy(text)
