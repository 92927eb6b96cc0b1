"""What the language miniatures read: Wikipedia prose and the Python manual, in 2048 byte-level BPE
tokens.

enwik8 is the XML of Wikipedia in 2006. `prose` keeps its articles as plain text: no redirects,
templates, tables, references, pictures, categories or markup. Documents follow each other in one
long row of ids, each begun by `<|endoftext|>`; batches are windows of it, at any place.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stratoscope.store import tensors
from stratoscope.store.cache import cached

START, MASK = "<|endoftext|>", "<|mask|>"
VERSION = 1  # raise it when the same settings give other ids


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training and the held-out text, each one long row, and the tokenizer that
    made them."""

    tokenizer: Any
    train: Int[Tensor, " token"]
    held: Int[Tensor, " held_token"]
    held_bytes: int  # of the held-out text, for bits per byte
    data: dict[str, Any]  # for the card


def corpus(say: Callable[[str], object], *, vocab: int = 2048, megabytes: float = 16.0) -> Corpus:
    """The first `megabytes` of enwik8's training part and a sixth as much of the Python manual;
    kept once read.

    Held out: the beginning of enwik8's validation part. Raises LoadError when the data cannot be
    had.
    """
    from transformers import PreTrainedTokenizerFast

    origin = hashlib.sha256(json.dumps([VERSION, vocab, megabytes]).encode()).hexdigest()

    def make(workshop: Path, ready: Path) -> None:
        _read(ready, vocab, megabytes, say)

    folder = cached(
        "miniatures",
        f"text-{origin[:8]}",
        origin,
        {"about": "ids of the miniatures' text"},
        make,
        say,
    )
    ids, about = tensors.read(folder / "ids.safetensors", kind=None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Corpus(tokenizer, ids["train"], ids["held"], about["held_bytes"], about["data"])


def windows(
    ids: Int[Tensor, " all_tokens"], n: int, length: int, generator: torch.Generator
) -> Int[Tensor, "example token"]:
    """n stretches of text, each from a random place."""
    starts = torch.randint(len(ids) - length + 1, (n, 1), generator=generator)
    return ids[starts + torch.arange(length)].long()


def seen(text: Corpus, tokens: int) -> str:
    """A note for the card."""
    return f"{tokens:,} tokens of text were seen in training, of {len(text.train):,}."


def language_judge(
    text: Corpus, length: int, logits: Callable[[Tensor], Tensor], *, tokens: int = 32768
) -> dict[str, float]:
    """Held-out loss (nats a token), bits a byte, accuracy; what counted bigrams reach; and how
    often a random list is continued the second time.

    logits: (example, token) ids -> (example, token, vocab).
    """
    rows = text.held[: min(tokens, len(text.held)) // length * length].long().view(-1, length)
    loss, right = 0.0, 0
    for part in rows.split(16):
        scores = logits(part)[:, :-1].flatten(0, 1).float()
        loss += torch.nn.functional.cross_entropy(
            scores, part[:, 1:].flatten(), reduction="sum"
        ).item()
        right += int((scores.argmax(-1) == part[:, 1:].flatten()).sum())
    count = len(rows) * (length - 1)
    bytes_each = text.held_bytes / len(text.held)
    period = min(24, length // 2)
    once = torch.randint(
        2, len(text.tokenizer), (64, period), generator=torch.Generator().manual_seed(1)
    )
    again = once.repeat(1, 2)
    second = logits(again)[:, period:-1].argmax(-1) == again[:, period + 1 :]
    return {
        "loss": loss / count,
        "bits_per_byte": loss / count / math.log(2) / bytes_each,
        "accuracy": right / count,
        "bigram_loss": bigram_loss(text, rows),
        "induction_accuracy": second.float().mean().item(),
    }


def bigram_loss(text: Corpus, rows: Int[Tensor, "example token"], *, prior: float = 100.0) -> float:
    """Nats a token of the rows by the bigrams of the whole training text, each smoothed by `prior`
    unigrams."""
    ids, size = text.train.long(), len(text.tokenizer)
    single = torch.bincount(ids, minlength=size).double() + 1
    single /= single.sum()
    pairs = torch.bincount(ids[:-1] * size + ids[1:], minlength=size * size).view(size, size)
    first, second = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    chance = (pairs[first, second] + prior * single[second]) / (pairs.sum(dim=1)[first] + prior)
    return -chance.log().mean().item()


# --- from the archives to ids ---------------------------------------------------------------------


def prose(xml: str) -> Iterator[str]:
    """The articles of a Wikipedia dump as plain text, each begun by its title."""
    for page in re.finditer(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", xml, re.DOTALL):
        title, text = (html.unescape(part) for part in page.groups())
        if ":" in title or re.match(r"\s*#redirect", text, re.IGNORECASE):
            continue
        if len(text := plain(text)) > 200:  # shorter ones are stubs and lists of links
            yield f"{title}\n\n{text}"


def plain(text: str) -> str:
    """Wiki markup as plain text: what a reader of the page sees, without boxes, pictures and
    footnotes."""
    text = html.unescape(text).replace("\u00a0", " ")
    text = re.sub(
        r"<!--.*?-->|<(ref|math|gallery|nowiki|timeline|div|table)\b[^>]*?(/>|>.*?</\1>)",
        "",
        text,
        flags=re.S,
    )
    text = re.sub(r"<[^<>\n]{1,200}>", "", text)
    before = None
    while before != text:  # from the innermost outwards: {{templates}}, {| tables |}
        before, text = text, re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|:]*)\]\]", r"\1", text)  # [[page|words]] -> words
    text = re.sub(r"\[\[[^\[\]]*\]\]", "", text)  # [[Image:...]], [[Category:...]], [[de:...]]
    text = re.sub(r"\[\w+://\S*\s?([^\]]*)\]", r"\1", text)  # [http://... words] -> words
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.M)
    text = re.sub(
        r"^[*#:;|!{}][*#:;|!{}\-+]* *.{0,40}$\n?", "", text, flags=re.M
    )  # short items: lists of links, boxes
    text = re.sub(r"^[*#:;]+ *", "", text, flags=re.M)
    text = re.sub(r" *\( *[;,]* *\)", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def _read(folder: Path, vocab: int, megabytes: float, say: Callable[[str], object]) -> None:
    """Write tokenizer and ids of the text into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from stratoscope.lab import data

    say("reading the text")
    size = int(megabytes * 1e6)
    wiki, manual = data("enwik8"), data("python-docs")
    articles = list(prose(_first(wiki.train, size)))
    pages = list(_pages(manual.train[::4], size // 6))  # from every chapter
    held = list(prose(_first(wiki.validation, 1_000_000)))
    say(f"learning {vocab} tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [START, MASK], "initial_alphabet": letters, "show_progress": False}
    bpe.train_from_iterator(articles + pages, trainers.BpeTrainer(vocab_size=vocab, **options))
    say("turning the text into ids")
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=START, eos_token=START, pad_token=START, mask_token=MASK
    ).save_pretrained(folder)
    about = {
        "held_bytes": sum(len(text.encode()) for text in held),
        "data": {
            "enwik8": f"first {megabytes:g} MB of the training part as plain prose, "
            f"{len(articles)} articles",
            "python-docs": f"{len(pages)} pages",
            "held_out": f"enwik8, first MB of the validation part, {len(held)} articles",
            "cards": {"enwik8": wiki.card, "python-docs": manual.card},
        },
    }
    ids = {"train": _ids(bpe, articles + pages), "held": _ids(bpe, held)}
    tensors.write(folder / "ids.safetensors", ids, kind="text", about=about)


def _ids(bpe: Any, texts: list[str]) -> Int[Tensor, " token"]:
    """Every text after a start token, in one row; 16 bits each, since ids stay below 32768."""
    rows = (
        id for text in bpe.encode_batch(texts, add_special_tokens=False) for id in (0, *text.ids)
    )
    return torch.tensor(list(rows), dtype=torch.int16)


def _first(texts: list[str], characters: int) -> str:
    taken, length = [], 0
    for text in texts:
        if length >= characters:
            break
        taken.append(text[: characters - length])
        length += len(taken[-1])
    return "".join(taken)


def _pages(texts: list[str], characters: int) -> Iterator[str]:
    """Whole pages until there are enough characters."""
    length = 0
    for text in texts:
        if length >= characters:
            return
        length += len(text)
        yield text
