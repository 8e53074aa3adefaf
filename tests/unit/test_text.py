"""Texts: tokens, encoders in blocks, hidden tokens and pairs of texts (rule 24)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.data.sources.corpus import TextCorpus, draw_pairs
from graft.data.sources.texts import TextTable, lines_of
from graft.models.backbone import Backbone
from graft.models.huggingface import huggingface_backbone
from graft.models.tokenizer import tokenizer_from, train_wordpiece
from graft.tasks.base import Tally
from graft.tasks.pretrain_bert import PretrainBert
from graft.training.build import build
from graft.transforms.text import MaskedInputs, TextInputs, read_tokenizer
from tests.conftest import Graft, compose

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")

GOOD = ["a", "bright", "and", "moving", "story", "told", "with", "care", "and", "warmth"]
BAD = ["the", "dull", "plot", "drags", "on", "without", "any", "sense", "or", "point"]
SMALL = {
    "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "intermediate_size": 32, "vocab_size": 120, "max_position_embeddings": 32,
}  # fmt: skip
NARROW = [f"backbone.architecture.{key}={value}" for key, value in SMALL.items()]


def sentence(rng: np.random.Generator, words: list[str]) -> str:
    return " ".join(rng.choice(words, rng.integers(3, 9)))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """train.csv, val.csv and test.csv of two classes that use other words."""
    folder, rng = tmp_path / "reviews", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 40), ("val", 16), ("test", 17)):
        lines = [
            f"{sentence(rng, BAD if i % 2 else GOOD)},{'bad' if i % 2 else 'good'}"
            for i in range(count)
        ]
        (folder / f"{split}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve documents, each of which uses its own half of the words."""
    rng = np.random.default_rng(1)
    documents = [
        "\n".join(sentence(rng, BAD if i % 2 else GOOD) for _ in range(8)) for i in range(12)
    ]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/texts.txt").write_text("\n\n\n".join(documents) + "\n")
    return tmp_path / "corpus"


def small(corpus: Path, **options: Any) -> Backbone:
    architecture = {**SMALL, **options.pop("architecture", {})}
    options = {"tokenizer": str(corpus), "weights": None, **options}
    return huggingface_backbone(architecture=architecture, **options).eval()


def saved(folder: Path, corpus: Path, kind: str, longest: int = 24, **changes: Any) -> Path:
    """A random encoder with a tokenizer, as transformers writes them."""
    torch.manual_seed(0)
    values = {key: value for key, value in SMALL.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(kind, **{**values, **changes}, pad_token_id=0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(tokenizer_from(str(corpus), 120)),
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask")},
        model_max_length=longest,
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("bert", ["embeddings", "layer1", "layer2", "pool"]),
        ("roberta", ["embeddings", "layer1", "layer2", "pool"]),
        ("distilbert", ["embeddings", "layer1", "layer2", "pool"]),
        ("albert", ["body", "pool"]),  # its layers are one, with the same weights
    ],
)
def test_blocks_give_what_the_encoder_gives(
    kind: str, blocks: list[str], tmp_path: Path, corpus: Path
) -> None:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if kind[0] == "d" else {}
    folder = saved(tmp_path / "encoder", corpus, kind, **sizes)
    backbone = huggingface_backbone(model=str(folder)).eval()
    assert backbone.block_names == blocks
    texts = ["a bright story", "the plot drags on without any point"]
    inputs = TextInputs(backbone.preprocessing)
    rows = inputs.preprocessing.rows([ids for ids, _ in inputs.preprocessing.encode(texts)], 24)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model(theirs["input_ids"], attention_mask=theirs["attention_mask"])[0]
        weights = theirs["attention_mask"][..., None]
        found = backbone(inputs.prepare(torch.from_numpy(rows)))
    assert torch.allclose(found, (tokens * weights).sum(1) / weights.sum(1), atol=1e-5)
    if kind == "bert":
        spared = {name.rpartition(".")[0] for name in backbone.no_weight_decay}
        assert spared == {
            f"embeddings.module.{name}_embeddings" for name in ("position", "token_type")
        }


@pytest.mark.parametrize("options", [{}, {"pooling": "cls"}, {"taps": "all"}])
def test_padding_changes_no_output(options: Mapping[str, Any], corpus: Path) -> None:
    """Rule 24: whatever else is in the batch, and whatever is pooled."""
    backbone = small(corpus, **options)
    inputs = TextInputs(backbone.preprocessing)
    texts = ["story", "the dull plot drags on without any sense or point the dull plot"]
    ids = [ids for ids, _ in backbone.preprocessing.encode(texts)]
    together = inputs.prepare(torch.from_numpy(backbone.preprocessing.rows(ids, 32)))
    assert together[0].shape == (2, 16)  # no wider than the longest text, a multiple of 8
    with torch.no_grad():
        for i, text in enumerate(ids):
            alone = inputs.prepare(torch.tensor([text], dtype=torch.int32))
            assert torch.allclose(backbone(alone)[0], backbone(together)[i], atol=1e-6)


def test_the_second_text_of_a_pair_has_another_type(corpus: Path) -> None:
    p = small(corpus).preprocessing
    rows = torch.tensor([[p.cls, 9, p.sep, 9, 9, p.sep, p.pad, p.pad]], dtype=torch.int32)
    _, mask, types = TextInputs(p).prepare(rows)
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert mask.tolist() == [[True] * 6 + [False] * 2]


def masked_batch(backbone: Backbone, rows: int = 400, length: int = 30) -> dict[str, Tensor]:
    p = backbone.preprocessing
    words = torch.randint(20, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    words[:, 0], words[:, length // 2], words[:, -1] = p.cls, p.sep, p.sep
    words[::2, 20:] = p.pad
    index = torch.arange(rows)
    return {"input": words.int(), "index": index, "label": index % 2}


def test_hidden_tokens(corpus: Path) -> None:
    """Rule 24: 15 % of each row, never a special token; 80 % the mask, 10 % another, 10 % stay."""
    backbone = small(corpus)
    inputs, batch = MaskedInputs(backbone.preprocessing), masked_batch(backbone)
    first = inputs.augment(batch, 2, seed=0, epoch=0)
    ids, chosen = first["input"][0], first["masked"] >= 0
    original = batch["input"].long()
    assert torch.equal(first["masked"][chosen], original[chosen])
    assert torch.equal(ids[~chosen], original[~chosen])
    ordinary = (original >= 20).sum(1)
    assert torch.equal(chosen.sum(1), (ordinary * 0.15).round().long())
    assert not chosen[original < 20].any()
    was, now = original[chosen], ids[chosen]
    mask = (now == backbone.preprocessing.mask).float().mean()
    assert 0.77 < mask < 0.83
    assert 0.08 < (now == was).float().mean() < 0.13
    assert (now >= 5).sum() + (now == backbone.preprocessing.mask).sum() == len(now)
    for change in ({"epoch": 1}, {"seed": 1}):
        other = inputs.augment(batch, 2, **{"seed": 0, "epoch": 0, **change})
        assert not torch.equal(other["masked"], first["masked"])
    # Of the index alone: neither the batch nor the worker that made it.
    part = {key: value[100:110] for key, value in batch.items()}
    again = inputs.augment(part, 2, seed=0, epoch=0)
    assert torch.equal(again["masked"], first["masked"][100:110])
    assert torch.equal(again["input"][0], ids[100:110])
    assert torch.equal(inputs.evaluated(batch)["masked"], inputs.evaluated(batch)["masked"])


class Asked(nn.Module):
    progress: Any = None
    features: Any = None

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(16, 2)

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.backbone(batch["input"]))


def test_the_losses_of_pretraining(corpus: Path) -> None:
    """Rules 22 and 24, and that metrics are those of the outputs."""
    torch.manual_seed(0)
    backbone = small(corpus, pooling="cls")
    model, task = Asked(backbone), PretrainBert()
    task.build(2, backbone)
    batch = MaskedInputs(backbone.preprocessing).evaluated(masked_batch(backbone, rows=8))
    tokens = backbone.maps(batch["input"])
    logits = task.transform(tokens) @ backbone.blocks[0].pieces.T + task.bias
    rows = [
        F.cross_entropy(logits[i][masked >= 0], masked[masked >= 0])
        for i, masked in enumerate(batch["masked"])
    ]
    following = F.cross_entropy(model.outputs(batch), batch["label"]).detach()
    assert torch.allclose(task.loss(model, batch), torch.stack(rows).mean() + following, atol=1e-5)
    for label in (0, 1):  # both teach
        model.zero_grad()
        one = {key: value for key, value in batch.items() if key != "input"}
        one = {key: value[label::2] for key, value in one.items()}
        one["input"] = tuple(part[label::2] for part in batch["input"])  # type: ignore[assignment]
        task.loss(model, one).backward()
        weight = model.head.weight.grad
        assert weight is not None
        assert weight.abs().sum() > 0
    tally = Tally()
    with torch.no_grad():
        task.evaluate(model, batch, tally)
    values = task.metrics(tally.take())
    chosen = batch["masked"] >= 0
    right = logits[chosen].argmax(1) == batch["masked"][chosen]
    assert float(values["masked_acc"]) == pytest.approx(float(right.float().mean()))
    assert float(values["next_loss"]) == pytest.approx(float(following), abs=1e-5)
    assert float(values["loss"]) == pytest.approx(
        float(values["next_loss"] + values["masked_loss"])
    )
    with pytest.raises(ValueError, match="hides no tokens: use data=text_corpus"):
        task.loss(model, {"input": batch["input"], "label": batch["label"]})


def test_pairs_follow_each_other_or_are_of_two_documents() -> None:
    documents = [
        [[d * 100 + s * 3 + t for t in range(1 + s % 3)] for s in range(12)] for d in range(6)
    ]
    pairs = [*draw_pairs(documents, 12, np.random.default_rng(0))] * 1
    for _ in range(20):
        pairs += draw_pairs(documents, 12, np.random.default_rng(len(pairs)))
    flat = [[token for sentence in document for token in sentence] for document in documents]
    for first, second, label in pairs:
        assert first
        assert second
        assert len(first) + len(second) <= 12
        same = first[0] // 100 == second[0] // 100
        assert same == (label == 0)
        if label == 0:
            text = flat[first[0] // 100]
            assert text[text.index(first[-1]) + 1] == second[0]
    assert 0.45 < np.mean([label for _, _, label in pairs]) < 0.55


def test_a_corpus_is_split_by_document_and_made_once(corpus: Path, tmp_path: Path) -> None:
    p = small(corpus).preprocessing
    source = TextCorpus(corpus, tmp_path / "cache", held_out=0.2, copies=2)
    source.prepare(p)
    (entry,) = (tmp_path / "cache").glob("texts-*[!k]")
    before = entry.stat().st_mtime_ns
    TextCorpus(corpus, tmp_path / "cache", held_out=0.2, copies=2).prepare(p)
    assert entry.stat().st_mtime_ns == before
    splits = source.load(p)
    assert splits.classes == ["next", "random"]
    assert splits.val is not None
    assert splits.test is not None
    assert len(splits.train.labels) > len(splits.val.labels) > 0
    assert splits.train.images.shape[1] == 32
    other = TextCorpus(corpus, tmp_path / "cache", held_out=0.2, copies=3)
    other.prepare(p)
    assert len(other.load(p).train.labels) > len(splits.train.labels)


def test_a_tokenizer_of_the_same_texts_is_the_same(corpus: Path) -> None:
    (file,) = corpus.iterdir()
    made = [train_wordpiece([file], 90) for _ in range(5)]
    assert len({*made}) == 1
    tokens = read_tokenizer(made[0]).encode("A Bright story [SEP]").tokens
    assert tokens[:2] == ["[CLS]", "a"]
    assert tokens.count("[SEP]") == 1  # what a text says is text


def test_long_texts_are_cut_and_counted(reviews: Path, corpus: Path, tmp_path: Path) -> None:
    p = small(corpus).preprocessing.at(8)
    (reviews / "test.csv").write_text(f"label,text\ngood,{' '.join(GOOD)}\nbad,dull\n")
    source = TextTable(reviews, tmp_path / "cache")
    source.prepare(p)
    loaded = source.load(p)
    assert loaded.test is not None
    assert loaded.test.images.shape == (2, 8)
    assert loaded.test.images[0, -1] == p.sep
    assert loaded.test.images[1].tolist()[3:] == [p.pad] * 5
    assert loaded.cut >= 1
    (note,) = TextInputs(p).notes(loaded.cut)
    assert note == f"{loaded.cut} texts longer than 8 tokens: the rest is not seen"
    with pytest.raises(ValueError, match=r"data.length=33: this encoder takes 8 tokens"):
        TextInputs(p, length=33)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,class\na,b\n", r"no column label; it has text, class: data.source.text="),
        (b"text,text,label\n", r"2 column text; it has"),
        (b"", r"no column text; it has none"),
        (b"text,label\ngood film,a\ncaf\xe9,b\n", r"line 3: not UTF-8 \(byte 0xe9\): save"),
        (b"text,label\na,b,c\n", r"line 2: 3 cells under 2 columns"),
        (b"text,label\n  ,b\n", r"line 2: no text in it"),
        (b"text,label\ngood,\n", r"line 2: no label in it"),
        (b"text,label\n\n", r"no texts in it"),
        (b'text,label\n"a,b\n', r"line \d: unexpected end of data"),
    ],
)
def test_tables_that_cannot_be_used(
    content: bytes, message: str, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextTable(tmp_path / "bad.csv", tmp_path / "cache").prepare(small(corpus).preprocessing)
    with pytest.raises(FileNotFoundError, match=r"no train.csv in this folder; data.root="):
        TextTable(tmp_path, tmp_path / "cache").prepare(small(corpus).preprocessing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\nthree\n", r"1 document: pairs for training, validation and test need 6"),
        (b"one\n\ntwo\n\n" * 4, r"no document of \w+ has two sentences"),
        (b"one\n\xfftwo\n", r"line 2: not UTF-8"),
    ],
)
def test_corpora_that_cannot_be_used(
    content: bytes, message: str, corpus: Path, tmp_path: Path
) -> None:
    p = small(corpus).preprocessing
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextCorpus(tmp_path / "bad.txt", tmp_path / "cache").prepare(p)
    (tmp_path / "few.txt").write_bytes(b"one\ntwo\n\n" * 8)
    with pytest.raises(ValueError, match=r"held_out=0.5: leaves too few of 8 documents"):
        TextCorpus(tmp_path / "few.txt", tmp_path / "cache", held_out=0.5).prepare(p)
    with pytest.raises(ValueError, match=r"data.length=6: a pair of texts needs 8 or more"):
        TextCorpus(tmp_path / "few.txt", tmp_path / "cache").prepare(p.at(6))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no text files \(.txt, .csv\)"):
        TextCorpus(empty, tmp_path / "cache").prepare(p)


def test_what_does_not_fit_an_encoder_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder", corpus, "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    with pytest.raises(ValueError, match="of another vocabulary: it has tokens up to number"):
        huggingface_backbone(model=str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"own config.json: 16 missing .*encoder.layer.2"):
        huggingface_backbone(model=str(folder))
    other = str(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"16 missing \(encoder.layer.2.attention"):
        small(corpus, architecture={"num_hidden_layers": 3}, weights=other)
    with pytest.raises(ValueError, match=r"of another shape \(embeddings.word_embeddings.weight"):
        small(corpus, architecture={"hidden_size": 32}, weights=other)
    with pytest.raises(ValueError, match=r"hidden_sizes: bert has no such: did you mean"):
        small(corpus, architecture={"hidden_sizes": 32})
    with pytest.raises(ValueError, match=r"backbone.architecture: .*multiple of the number"):
        small(corpus, architecture={"hidden_size": 15})
    with pytest.raises(ValueError, match=r"vocab_size=\d+: too few"):
        small(corpus, architecture={"vocab_size": 20})
    with pytest.raises(ValueError, match=r"name a tokenizer.json, a run on texts"):
        small(corpus, tokenizer=None)
    with pytest.raises(ValueError, match="name an encoder's folder or a model on the hub"):
        huggingface_backbone()
    with pytest.raises(ValueError, match="_attn_implementation: bert has no such"):
        small(corpus, architecture={"_attn_implementation": "a/kernel"})
    with pytest.raises(FileNotFoundError, match=r"backbone.model=./none: no such folder"):
        huggingface_backbone(model="./none")


def test_options_of_another_kind_of_encoder_are_refused(corpus: Path) -> None:
    """Rule 25: they would not be looked at."""
    new = {"model_type": "bert"}
    with pytest.raises(ValueError, match=r"backbone.model brings its own architecture"):
        huggingface_backbone(model="m", architecture=new)
    with pytest.raises(ValueError, match=r"backbone.tokenizer is for a new encoder"):
        huggingface_backbone(model="m", tokenizer=str(corpus))
    with pytest.raises(ValueError, match=r"backbone.weights=DEFAULT: a new encoder has none"):
        huggingface_backbone(architecture=new, tokenizer=str(corpus), weights="DEFAULT")


def test_lines_are_those_of_an_editor() -> None:
    assert lines_of("a\u2028b\x0cc\r\nd") == ["a\u2028b\x0cc", "d"]


def test_a_folder_named_like_a_model_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert compose("backbone=resnet18")["backbone"]["model"] == "resnet18"
    (tmp_path / "resnet18" / "config.json").write_text("{}")
    named = compose("backbone=huggingface", "backbone.model=resnet18")["backbone"]["model"]
    assert named == str(tmp_path / "resnet18")


def test_the_positions_of_some_encoders_begin_after_padding(tmp_path: Path, corpus: Path) -> None:
    folder = saved(tmp_path / "encoder", corpus, "roberta", longest=1000)
    backbone = huggingface_backbone(model=str(folder)).eval()
    longest = backbone.preprocessing.length
    ids = torch.full((1, longest), 9, dtype=torch.int32)
    backbone(TextInputs(backbone.preprocessing).prepare(ids))
    assert longest < 32


def test_images_and_texts_are_not_mixed(reviews: Path) -> None:
    with pytest.raises(ValueError, match="TextTable has rows for TextInputs, which this backbone"):
        build(compose("data=text_csv", f"data.root={reviews}"))


def test_from_pretraining_to_answers(graft: Graft, reviews: Path, corpus: Path) -> None:
    """A run keeps what it needs: neither corpus nor pretrained encoder are there in the end."""
    common = [
        "trainer=cpu",
        "logger=csv",
        "trainer.max_epochs=1",
        "data.batch_size=8",
        "data.epoch_images=null",
    ]
    done = graft(
        "train",
        "experiment=pretrain_bert",
        f"data.root={corpus}",
        *NARROW,
        *common,
        "data.length=32",
    )
    assert done.returncode == 0, done.stderr
    (pretrained,) = Path("logs").resolve().glob("*pretrain_bert*")
    record = json.loads((pretrained / "run.json").read_text())
    names = ("acc", "loss", "next_loss", "masked_acc", "masked_loss")
    assert {f"test/{name}" for name in names} <= record["metrics"].keys()
    shutil.rmtree(corpus)

    plan = ["transfer.stages.probe.epochs=3", "data.val_fraction=0.2"]
    done = graft(
        "train", "experiment=text_finetune", f"data.root={reviews}", *common, *plan,
        f"backbone.weights={pretrained}", "trainer.max_epochs=12", "optimizer.lr=0.01",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tensors of" in done.stdout
    assert "40 train, 16 val, 17 test texts" in done.stdout or "texts, 2 classes" in done.stdout
    (run,) = (path for path in Path("logs").resolve().iterdir() if path != pretrained)
    record = json.loads((run / "run.json").read_text())
    assert record["metrics"]["test/acc"] > 0.9
    shutil.rmtree(pretrained)

    done = graft("eval", str(run))
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "eval/test.json").read_text())
    assert result["metrics"]["acc"] == pytest.approx(record["metrics"]["test/acc"])
    Path("lines.txt").write_text("a moving story\n\nthe dull plot\n")
    done = graft("predict", str(run), "lines.txt", "--text", "dull , without point")
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[-5] for line in done.stdout.splitlines()[1:]] == ["bad", "good", "bad"]
    done = graft("export", str(run))
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"only graft predict {run} --text knows them")
