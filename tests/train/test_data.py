"""Documents, packed rows of them, and streams that stop and go on: nothing is lost, doubled, or mixed."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.train.data import Encoding, held_out_batches, open_documents, open_pairs, pair_batches, text_batches
from kvx.train.data.tokenise import tokenise
from tests.train.letters import letters

TOKENIZER = letters()
ENCODING = Encoding.of(TOKENIZER)
IDS = Encoding(None, 10_000)
TEXTS = [f"document {index}: " + "abc" * (index % 7) for index in range(23)]


def runs(*lengths: int) -> list[np.ndarray]:
    """Documents of ids that all differ."""
    ends = np.cumsum((1, *lengths))
    return [np.arange(start, end) for start, end in pairwise(ends)]


def written(folder, texts, name="a.jsonl"):
    path = folder / name
    lines = "".join(json.dumps({"text": text, "source": "s"}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return str(path)


def same(first, second):
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("tokens", "segments", "positions", "mask")
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    sequence=st.integers(2, 17),
    batch=st.integers(1, 4),
)
def test_every_token_appears_exactly_once_and_in_order(lengths, sequence, batch):
    documents = runs(*lengths)
    stream = text_batches(documents, IDS, sequence=sequence, batch=batch, shuffle=False, epochs=1)
    found = list(stream)
    tokens = np.concatenate([each.tokens[each.mask] for each in found])
    np.testing.assert_array_equal(tokens, np.concatenate(documents))
    padding = sum(each.mask.size for each in found) - len(tokens)
    assert padding < sequence * batch  # only the last batch is filled up
    for each in found:
        assert each.tokens.shape == (batch, sequence)
        for row in range(batch):
            check_row(each, row, documents)


def check_row(batch, row, documents):
    """Segments count the pieces of a row; positions restart with each; a segment is of one document."""
    segments, positions, mask = batch.segments[row], batch.positions[row], batch.mask[row]
    np.testing.assert_array_equal(mask, segments > 0)
    np.testing.assert_array_equal(positions[~mask], -1)
    assert np.all(np.diff(mask.astype(int)) <= 0)  # padding comes last
    for number in range(1, segments.max() + 1):
        (place,) = np.nonzero(segments == number)
        np.testing.assert_array_equal(place, np.arange(place[0], place[-1] + 1))
        np.testing.assert_array_equal(positions[place], np.arange(len(place)))
        piece = batch.tokens[row, place]
        assert sum(np.isin(piece, document).all() for document in documents if len(document)) == 1


def test_the_order_is_the_seeds_and_another_every_epoch():
    documents = runs(*[1] * 40)

    def epochs(**options):
        stream = text_batches(documents, IDS, sequence=8, batch=5, **options)
        return [next(stream).tokens.ravel() for _ in range(2)]

    first, second = epochs(seed=3)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    np.testing.assert_array_equal(epochs(seed=3), [first, second])
    assert not np.array_equal(epochs(seed=4)[0], first)
    np.testing.assert_array_equal(epochs(shuffle=False), [np.arange(1, 41)] * 2)


@settings(max_examples=8, deadline=None)
@given(taken=st.integers(0, 60), longest=st.integers(2, 40), seed=st.integers(0, 9))
def test_a_restored_stream_goes_on_as_if_it_had_not_stopped(taken, longest, seed):
    lengths = np.random.default_rng(seed).integers(1, longest, 400)  # shuffling few documents is slow in grain

    def stream():
        return text_batches(runs(*lengths), IDS, sequence=7, batch=3, seed=seed)

    whole = stream()
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    again = stream()
    next(again)  # where it is does not matter
    again.set_state(state)
    for _ in range(8):
        assert same(next(whole), next(again))


def test_the_shares_of_processes_make_up_the_batch():
    documents = runs(*range(1, 30))

    def first(count, **share):
        stream = text_batches(documents, IDS, sequence=8, batch=6, seed=1, **share)
        return [next(stream) for _ in range(count)]

    parts = [first(6, share=index, shares=3) for index in range(3)]
    for step, whole in enumerate(first(6)):
        together = np.concatenate([part[step].tokens for part in parts])
        np.testing.assert_array_equal(together, whole.tokens)
    seen = np.concatenate([each.tokens[each.mask] for part in parts for each in part])
    assert len(np.unique(seen[seen > 0])) == min(len(seen), 29 * 30 // 2)  # disjoint as long as an epoch lasts
    with pytest.raises(BadInput, match="batch=6 over 4 processes"):
        first(1, share=0, shares=4)


def test_a_state_goes_on_with_another_number_of_processes():
    documents = runs(*range(1, 20))
    alone = text_batches(documents, IDS, sequence=8, batch=4, seed=1)
    next(alone)
    state = alone.get_state()
    second = text_batches(documents, IDS, sequence=8, batch=4, seed=1, share=1, shares=2)
    second.set_state(state)
    np.testing.assert_array_equal(next(second).tokens, next(alone).tokens[2:])


def test_a_state_of_another_text_is_refused():
    state = text_batches(runs(3, 4), IDS, sequence=8, batch=1).get_state()
    with pytest.raises(BadInput, match="documents is 3, and was 2"):
        text_batches(runs(3, 4, 5), IDS, sequence=8, batch=1).set_state(state)
    with pytest.raises(BadInput, match="sequence is 9, and was 8"):
        text_batches(runs(3, 4), IDS, sequence=9, batch=1).set_state(state)
    for before, after in (
        (runs(3, 4), [np.arange(3), np.arange(4)]),  # of equal lengths
        (["ab", "cd"], ["ab", "ce"]),
        (["a" * 5000 + "b"], ["a" * 5001 + "b"]),  # alike for long
        ([[{"role": "user", "content": "a"}]], [[{"role": "user", "content": "b"}]]),
    ):
        first, second = (text_batches(each, ENCODING, sequence=8, batch=1) for each in (before, after))
        with pytest.raises(BadInput, match=r"the data's text is '.*', and was '"):
            second.set_state(first.get_state())
    pairs = [{"prompt": "a", "chosen": chosen, "rejected": "c"} for chosen in "de"]
    first, second = (pair_batches([each], TOKENIZER, sequence=8, prompt=4, batch=1) for each in pairs)
    with pytest.raises(BadInput, match="the data's text is"):
        second.set_state(first.get_state())


def test_held_out_text_is_what_comes_first_and_ends():
    batches = held_out_batches(runs(*[10] * 10), IDS, sequence=8, batch=2, tokens=30)
    np.testing.assert_array_equal(np.concatenate([each.tokens for each in batches]).ravel(), np.arange(1, 33))
    everything = held_out_batches(runs(*[10] * 10), IDS, sequence=8, batch=2, tokens=10**6)
    assert sum(int(each.mask.sum()) for each in everything) == 100


def test_files_of_all_kinds_hold_the_same_documents(tmp_path):
    from_lines = open_documents([written(tmp_path, TEXTS)], "data.train")
    zipped = open_documents([written(tmp_path, TEXTS, "b.jsonl.gz")], "data.train")
    table = pyarrow.table({"text": TEXTS, "other": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=5)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for index, part in enumerate((table[:9], table[9:])):
        with pyarrow.ipc.new_stream(dataset / f"data-{index}.arrow", table.schema) as file:
            file.write_table(part)
    (dataset / "cache-1234.arrow").write_bytes(b"not of the dataset")
    entries = [{"filename": f"data-{index}.arrow"} for index in range(2)]
    (dataset / "state.json").write_text(json.dumps({"_data_files": entries}))
    plain = tmp_path / "plain"
    (plain / "sub").mkdir(parents=True)
    for index, text in enumerate(TEXTS):
        (plain / "sub" / f"{index:02d}.txt").write_text(text)
    others = [open_documents([str(path)], "data.train") for path in (tmp_path / "c.parquet", dataset, plain)]
    for documents in (from_lines, zipped, *others):
        assert [documents[index] for index in range(len(documents))] == TEXTS


@pytest.mark.parametrize("kind", ["npy", "uint16", "uint32"])
def test_tokens_made_before_give_the_rows_of_the_text(tmp_path, kind):
    ids = np.concatenate([ENCODING(text) for text in TEXTS])
    path = tmp_path / ("a.npy" if kind == "npy" else "a.bin")
    np.save(path, ids.astype(np.uint16)) if kind == "npy" else ids.astype(kind).tofile(path)
    made = open_documents([str(path)], "data.train", end=ENCODING.end, dtype="uint32" if kind == "uint32" else "uint16")
    assert len(made) == len(TEXTS)
    known = Encoding(None, TOKENIZER.vocabulary)
    options = {"sequence": 16, "batch": 2, "seed": 5}
    streams = text_batches(made, known, **options), text_batches(TEXTS, ENCODING, **options)
    for _ in range(10):
        assert same(*map(next, streams))


def test_text_tokenised_once_gives_the_rows_of_the_text(tmp_path):
    out = tmp_path / "a.bin"
    count, dtype = tokenise(TEXTS, ENCODING, out)
    assert count == sum(len(ENCODING(text)) for text in TEXTS) and dtype == np.uint16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.bin.ends"]  # nothing half-written stays
    made = open_documents([str(out)], "data.train", end=ENCODING.end)
    options = {"sequence": 16, "batch": 2, "shuffle": False}
    streams = text_batches(made, Encoding(None, 98), **options), text_batches(TEXTS, ENCODING, **options)
    for _ in range(5):
        assert same(*map(next, streams))
    with pytest.raises(BadInput, match="cannot be written"):
        tokenise(TEXTS, ENCODING, tmp_path / "none" / "a.bin")


def test_a_chat_whose_turns_end_as_documents_do_stays_one_document(tmp_path):
    """ChatML closes every turn with the token that also ends a text; a file without ends falls apart at each."""
    tokenizer = letters(chat=True)
    chats = [
        [{"role": role, "content": text} for role, text in turns] for turns in ([("user", "a"), ("assistant", "b")],)
    ]
    out = tmp_path / "a.bin"
    tokenise(chats * 3, Encoding.of(tokenizer), out)
    made = open_documents([str(out)], "data.train", end=tokenizer.eos_ids[0])
    assert [tokenizer.decode(each, skip_special=False) for each in made] == ["user: a</s>assistant: b</s>"] * 3
    (tmp_path / "a.bin.ends").unlink()
    assert len(open_documents([str(out)], "data.train", end=tokenizer.eos_ids[0])) == 6


@pytest.mark.parametrize("damage", [b"", b"no numbers", None])
def test_ends_that_are_not_those_of_the_file_are_refused(tmp_path, damage):
    out = tmp_path / "a.bin"
    tokenise(TEXTS, ENCODING, out)
    if damage is None:
        tokenise(TEXTS[:1], ENCODING, tmp_path / "other.bin")
        damage = (tmp_path / "other.bin.ends").read_bytes()
    (tmp_path / "a.bin.ends").write_bytes(damage)
    with pytest.raises(BadInput, match=r"a\.bin\.ends (cannot be read|does not fit)"):
        open_documents([str(out)], "data.train")


def test_the_documentation_of_python_is_always_there():
    first, second = (open_documents([f"python-docs/{half}-half"], "data.train") for half in ("first", "second"))
    assert len(first[0]) > 100_000 and len(second[0]) > 100_000 and first[0][:1000] not in second[0]


def test_messages_that_are_none_are_refused():
    with pytest.raises(BadInput, match="messages hold 1, which is none; allowed: objects with role"):
        Encoding.of(letters(chat=True))([1, 2])


def test_documents_begin_and_end_as_the_model_wants():
    ids = ENCODING("ab").tolist()
    assert ids[0] == TOKENIZER.bos_id and ids[-1] == ENCODING.end and TOKENIZER.decode(ids) == "ab"
    chat = letters(chat=True)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids = Encoding.of(chat)(messages).tolist()
    assert chat.decode(ids, skip_special=False) == "user: hi</s>assistant: ho</s>"


def test_what_is_wrong_with_a_file_names_file_and_line(tmp_path):
    def refused(text: bytes, name: str = "a.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(text)
        with pytest.raises(BadInput) as caught:
            open_documents([str(path)], "data.train")
        return str(caught.value)

    good = json.dumps({"text": "fine"}).encode() + b"\n"
    assert "a.jsonl:3 is not JSON" in refused(good * 2 + b'{"text": \n' + good)
    assert "a.jsonl:2 has the fields ['body']" in refused(good + b'{"body": "x"}\n')
    assert "a.jsonl:2: 'text' is a int" in refused(good + b'{"text": 3}\n')
    assert "a.jsonl:1 is a list" in refused(b"[1]\n")
    assert "a.jsonl:2: messages hold {'role': 3}, which is none" in refused(good + b'{"text": [{"role": 3}]}\n')
    assert "a.jsonl:2 is not UTF-8" in refused(good + b'{"text": "\xff"}\n')
    assert "cannot be unpacked" in refused(gzip.compress(good * 100)[:-20], "b.jsonl.gz")
    assert "cannot be unpacked" in refused(good, "c.jsonl.gz")
    assert "is not UTF-8 at byte 2" in refused(b"ab\xff", "d.txt")
    assert "holds no text" in refused(b'{"text": " "}\n', "e.jsonl")
    assert "holds no text" in refused(b"", "f.jsonl")
    assert "cannot be read" in refused(b"PAR1 and no table", "g.parquet")
    assert "cannot be read" in refused(b"no arrow", "h.arrow")
    assert "a multiple of 2" in refused(b"abc", "i.bin")
    assert "cannot be read as token ids" in refused(b"no array", "j.npy")


def test_what_is_wrong_with_a_path_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    splits = tmp_path / "splits"
    (splits / "train").mkdir(parents=True)
    (splits / "dataset_dict.json").write_text("{}")
    (tmp_path / "a.pdf").write_bytes(b"x")
    for paths, sentence in (
        ([], "data.train is empty"),
        (["nowhere"], "'nowhere', which does not exist"),
        ([str(tmp_path / "empty")], "a folder; allowed: one with files of"),
        ([str(splits)], "one of its folders train"),
        ([str(tmp_path / "a.pdf")], "allowed: files of .txt"),
    ):
        with pytest.raises(BadInput, match=sentence):
            open_documents(paths, "data.train")


def test_what_a_vocabulary_does_not_hold_is_refused():
    with pytest.raises(BadInput, match="token ids reach 99; allowed: 0 to 49"):
        Encoding(None, 50)(np.arange(100))
    with pytest.raises(BadInput, match="document 2 of 2: token ids reach 99; allowed: 0 to 49"):
        next(text_batches([np.arange(9), np.arange(100)], Encoding(None, 50), sequence=16, batch=1, shuffle=False))
    with pytest.raises(BadInput, match="there is no tokenizer"):
        Encoding(None, 50)("text")


@pytest.mark.parametrize("chat", [False, True])
def test_pairs_share_their_prompt_and_only_answers_are_learned(tmp_path, chat):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {index}", "chosen": "y" * 9, "rejected": "no"} for index in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, tokenizer = open_pairs([str(path)], "data.pairs.train"), letters(chat)
    options = {"sequence": 40, "prompt": 24, "batch": 2, "seed": 1}
    stream = pair_batches(pairs, tokenizer, **options)
    for _ in range(4):
        found = next(stream)
        for chosen, rejected, side in ((found.chosen, found.rejected, "y" * 9), (found.rejected, found.chosen, "no")):
            for row in range(2):
                answer = chosen.tokens[row][chosen.mask[row]].tolist()
                assert tokenizer.decode(answer) == side and answer[-1] == tokenizer.eos_ids[0]
                asked = (chosen.segments[row] > 0) & ~chosen.mask[row]
                other = (rejected.segments[row] > 0) & ~rejected.mask[row]
                np.testing.assert_array_equal(chosen.tokens[row][asked], rejected.tokens[row][other])
                assert ("assistant: " in tokenizer.decode(chosen.tokens[row][asked])) == chat
    state = json.loads(json.dumps(stream.get_state()))
    again = pair_batches(pairs, tokenizer, **options)
    again.set_state(state)
    assert same(next(stream).chosen, next(again).chosen)


def test_long_prompts_keep_their_end_and_long_answers_their_beginning():
    pairs = [{"prompt": "p" * 50 + "end", "chosen": "begin" + "c" * 50, "rejected": "r"}]
    found = next(pair_batches(pairs, TOKENIZER, sequence=10, prompt=4, batch=1)).chosen
    assert TOKENIZER.decode(found.tokens[0]) == "pendbeginc"


def test_a_broken_pair_names_file_and_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for bad in ({**good, "chosen": ""}, {"prompt": "a"}, [1]):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(BadInput, match=r"pairs\.jsonl:2: '"):
            open_pairs([str(path)], "data.pairs.train")
    path.write_text("")
    with pytest.raises(BadInput, match="holds no pair"):
        open_pairs([str(path)], "data.pairs.train")
