"""Claims about plans: bytes are those of the model that will be saved, as configs and sheets state them."""

from pathlib import Path

import jax.numpy as jnp

from kvx.models.build import abstract_model
from kvx.train.job_file import read_job
from kvx.train.plan import cache_bytes
from kvx.train.shapes import model_config, model_shapes

CONFIGS = Path(__file__).parents[2] / "configs"


def test_bytes_of_llama_3_2_1b_are_the_sheet_s():
    """X-EcoMLA at rank 64 and rotary 32 in bfloat16: 3,072 bytes a token, of 32,768."""
    job = read_job(CONFIGS / "xecomla_llama32_1b.toml")
    source = abstract_model(model_config(job.model, job.shapes), jnp.bfloat16)
    found = [cache_bytes(model, job.saved_dtype) for model in (model_shapes(job)[0], source)]
    assert found == [3072, 32768]
    assert [cache_bytes(source, "float32")] == [2 * 32768]
