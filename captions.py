"""Captions as conditions of a GPT, and the files that hold them.

A caption is a row of T tokens: ids of a sentencepiece model, or features of FLAN-T5 with C channels each. Rows end with
an end token and are padded on the left where they meet in a batch. A picture may have several captions.
"""

import hashlib
import io
import itertools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from common import whole_characters
from gpt import END, PAD
from t5 import T5Encoder, clean_caption, open_sentencepiece


def train_tokenizer(captions, vocab_size, kind):
    """A sentencepiece model of captions (an iterable of strings), as bytes; ids 0 to 2 are padding, end, unknown.

    kind: "unigram", "bpe" or "word". Letters are folded to lower case, characters outside the vocabulary become bytes
    (not with "word"). At most a million captions are read for it. ValueError if no vocabulary can be made of them.
    """
    out, more = io.BytesIO(), {} if kind == "word" else dict(byte_fallback=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=out, vocab_size=vocab_size, model_type=kind,
            hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf", character_coverage=1.0,
            pad_id=PAD, eos_id=END, unk_id=2, bos_id=-1, input_sentence_size=1_000_000, num_threads=1, minloglevel=2,
            **more,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer could be made of these captions: {str(error).splitlines()[0]}") from None
    return out.getvalue()


class CaptionTokens:
    """Captions as ids of a sentencepiece model, given as bytes; ValueError if it is none, or has other special ids."""

    kind = "tokens"

    def __init__(self, model, length, source="the tokenizer"):
        self.model, self.length, self.source = bytes(model), length, source
        self.tokenizer = open_sentencepiece(source, model_proto=self.model)
        self.size = len(self.tokenizer)

    def about(self):
        """What meta.json says of captions read so; CaptionFile knows them by it."""
        sha = hashlib.sha256(self.model).hexdigest()
        return dict(kind=self.kind, size=self.size, length=self.length, model_sha256=sha)

    def rows(self, texts):
        """int64 arrays [T], one for each text, with the end; longer ones are cut to `length`."""
        texts = [whole_characters(text) for text in texts]
        return [np.array([*ids[: self.length - 1], END]) for ids in self.tokenizer.encode(texts)]

    def unread(self, text):
        """What of a text the model will not see: the pieces that the vocabulary lacks, and those beyond the length."""
        text, known, unknown = whole_characters(text), self.length - 1, self.tokenizer.unk_id()
        ids, pieces = self.tokenizer.encode(text), self.tokenizer.encode(text, out_type=str)
        lost = [piece.strip("▁") for piece, i in zip(pieces[:known], ids, strict=False) if i == unknown]
        return " ".join([*lost, self.tokenizer.decode(ids[known:])]).strip()


class CaptionFeatures:
    """Captions, cleaned up, as features of a T5Encoder that was read from the folder `source`."""

    kind = "t5"

    def __init__(self, encoder, length, source):
        self.encoder, self.length, self.source, self.size = encoder, length, str(source), encoder.config.d_model

    def about(self):
        """What meta.json says of captions read so; CaptionFile knows them by it."""
        return dict(kind=self.kind, size=self.size, length=self.length, t5=self.source)

    def rows(self, texts):
        """uint16 arrays [T, C], the bits of bfloat16, one for each text; longer ones are cut to `length`."""
        features, mask = self.encoder.encode([clean_caption(text) for text in texts], self.length)
        bits = features.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)  # B, T, C
        return [row[:n] for row, n in zip(bits, mask.sum(1).tolist(), strict=True)]

    def unread(self, text):
        """What of a text the model will not see: what stands beyond the length."""
        pieces = self.encoder.tokenizer.encode(clean_caption(text), out_type=str)
        return "".join(pieces[self.length - 1 :]).replace("▁", " ").strip()


def open_reader(cond, about, t5_folder, device, source):
    """What turns texts into the rows that a GPT reads, by the `cond` of its config and `about`, what its codes say of
    captions and their tokenizer; `source` is its file.

    Where `about` is None (published files) the rows are those of FLAN-T5-XL in t5_folder, 120 tokens. Raises ValueError
    for a GPT that reads no text, and where the tokenizer or the encoder is missing.
    """
    if cond == "class" or (cond == "tokens" and not about):
        what = "is conditioned on classes" if cond == "class" else "does not hold its tokenizer"
        raise ValueError(f"{source} {what}")
    about = about or dict(kind="t5", length=120)
    if about["kind"] == "tokens":
        if t5_folder:
            raise ValueError(f"{source} reads captions by a tokenizer of its own: leave --t5 out")
        return CaptionTokens(about["model"], about["length"], source)
    folder = t5_folder or about.get("t5")
    if not folder:
        raise ValueError(f"{source} reads features of FLAN-T5-XL: give its folder with --t5")
    return CaptionFeatures(T5Encoder.from_pretrained(folder, device), about["length"], folder)


def condition(rows, length, kind):
    """Rows of at most `length` tokens -> what GPT.forward takes, padded on the left: (ids int64 [B, length],), or
    (features bfloat16 [B, length, C], mask bool [B, length])."""
    shape = (len(rows), length, *rows[0].shape[1:])
    cond, mask = np.zeros(shape, np.int64 if kind == "tokens" else np.uint16), np.zeros(shape[:2], bool)
    for i, row in enumerate(rows):
        cond[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    if kind == "tokens":
        return (torch.from_numpy(cond),)  # padding is token 0
    return torch.from_numpy(cond.view(np.int16)).view(torch.bfloat16), torch.from_numpy(mask)


def without_path(about):
    """What tells one reader from another, by what `about()` says: all but where its T5 lies."""
    return about and {name: value for name, value in about.items() if name != "t5"}


# Files


def id_dtype(size):
    """The dtype that files keep numbers below `size` in."""
    return np.dtype(np.uint16 if size <= 65536 else np.int32)


def row_dtype(kind, size):
    return id_dtype(size if kind == "tokens" else 65536)  # features: the bits of bfloat16


class CaptionWriter:
    """Writes the captions of pictures, in order, beside their codes: text.bin, text_offsets.npz, captions.jsonl, and
    tokenizer.model where there is one.

    text.bin holds the valid tokens of every caption and nothing else; only offsets are kept in memory. Use as a context
    manager; the files take their names when it closes without an error.
    """

    def __init__(self, folder, reader):
        self.folder, self.reader, self.dtype = Path(folder), reader, row_dtype(reader.kind, reader.size)
        self.captions, self.rows = [0], [0]  # ends of the pictures in captions, of the captions in rows
        self.folder.mkdir(parents=True, exist_ok=True)
        self.values, self.texts = (open(self._temporary(name), "wb") for name in ("text.bin", "captions.jsonl"))

    def _temporary(self, name):
        return self.folder / f".{name}.partial"

    def write(self, captions):
        """The captions of some more pictures, a list of strings for each."""
        rows = iter(self.reader.rows([text for texts in captions for text in texts]))
        for texts in captions:
            for row in itertools.islice(rows, len(texts)):
                self.values.write(row.astype(self.dtype).tobytes())
                self.rows.append(self.rows[-1] + len(row))
            self.captions.append(self.captions[-1] + len(texts))
            self.texts.write(json.dumps(texts).encode() + b"\n")

    def take(self, file):
        """The captions of some more pictures: those of a CaptionFile with the same reader, as they are."""
        self.rows.extend((self.rows[-1] + file.rows[1:]).tolist())
        self.captions.extend((self.captions[-1] + file.captions[1:]).tolist())
        for name, values in (("text.bin", self.values), ("captions.jsonl", self.texts)):
            with open(file.folder / name, "rb") as part:
                shutil.copyfileobj(part, values)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        names = ["text.bin", "captions.jsonl", "text_offsets.npz"]
        if self.reader.kind == "tokens":
            names.append("tokenizer.model")
        try:
            with self.values, self.texts:  # closes both, and may fail again on a full disk
                pass
            if error is None:
                with open(self._temporary("text_offsets.npz"), "wb") as file:
                    np.savez(file, captions=np.array(self.captions), rows=np.array(self.rows))
                if self.reader.kind == "tokens":
                    self._temporary("tokenizer.model").write_bytes(self.reader.model)
                (self.folder / "meta.json").unlink(missing_ok=True)  # of codes before: theirs are other captions
                for name in names:
                    self._temporary(name).replace(self.folder / name)
        finally:
            for name in names:
                self._temporary(name).unlink(missing_ok=True)


def count_lines(path):
    """Whole lines of a file."""
    with open(path, "rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))


class CaptionFile:
    """What CaptionWriter wrote for n pictures, opened and checked; `about` is its reader's, out of meta.json.

    Raises ValueError, naming the file, where something is missing, truncated or does not fit.
    """

    def __init__(self, folder, about, n):
        self.folder, self.kind, self.size, self.length = Path(folder), about["kind"], about["size"], about["length"]
        path = self.folder / "text_offsets.npz"
        try:
            with np.load(path) as file:
                self.captions, self.rows = file["captions"], file["rows"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is missing, truncated or damaged ({error})") from None
        counts = np.diff(self.captions), np.diff(self.rows)
        if len(self.captions) != n + 1 or len(self.rows) != self.captions[-1] + 1 or min(c.min() for c in counts) < 1:
            raise ValueError(f"{path} does not hold the captions of {n} pictures")
        if counts[1].max() > self.length:
            raise ValueError(f"{path} has a caption of {counts[1].max()} tokens, and {self.length} is the longest")
        shape = (int(self.rows[-1]),) if self.kind == "tokens" else (int(self.rows[-1]), self.size)
        path, dtype = self.folder / "text.bin", row_dtype(self.kind, self.size)
        if not path.is_file() or path.stat().st_size != int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{path} is missing or truncated: it should hold {dtype} {list(shape)}")
        self.values = np.memmap(path, dtype, "r", shape=shape)
        self.model = None
        if self.kind == "tokens":
            self._check_tokens(path, about["model_sha256"])
        path = self.folder / "captions.jsonl"
        if not path.is_file() or count_lines(path) != n:
            raise ValueError(f"{path} is missing or truncated: it should hold {n} lines")

    def _check_tokens(self, path, sha256):
        for first in range(0, len(self.values), 1 << 20):
            block = self.values[first : first + (1 << 20)]
            if (most := int(block.view(f"u{block.itemsize}").max())) >= self.size:  # below 0 is far above
                raise ValueError(f"{path} holds token {most}, the vocabulary ends at {self.size - 1}")
        path = self.folder / "tokenizer.model"
        self.model = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(self.model).hexdigest() != sha256:
            raise ValueError(f"{path} is missing, or not the one that these captions were written with")

    def check(self):
        """Reads what opening does not: features, which have to be finite, and texts; ValueError names the file."""
        path = self.folder / "text.bin"
        for first in range(0, len(self.values) if self.kind == "t5" else 0, 4096):
            bad = (self.values[first : first + 4096] & 0x7F80 == 0x7F80).any(1)  # the exponent of infinity and NaN
            if bad.any():
                raise ValueError(f"{path} is damaged: the features of token {first + bad.argmax()} are not finite")
        path = self.folder / "captions.jsonl"
        with open(path, "rb") as file:
            for number, (line, n) in enumerate(zip(file, np.diff(self.captions), strict=False), 1):
                try:
                    good = isinstance(texts := json.loads(line), list) and len(texts) == n
                except (ValueError, RecursionError):
                    good = False
                if not good:
                    raise ValueError(f"{path} is damaged: line {number} is no list of {n} captions")

    def condition(self, indices, draws=None):
        """The condition of pictures [B]: of their first captions, or of caption `draws[i]` modulo their number."""
        first, count = self.captions[indices], self.captions[np.asarray(indices) + 1] - self.captions[indices]
        chosen = first if draws is None else first + draws % count
        rows = [np.asarray(self.values[self.rows[j] : self.rows[j + 1]]) for j in chosen]
        return condition(rows, self.length, self.kind)

    def texts(self, indices):
        """The first captions of pictures, as they were read."""
        wanted, found = set(map(int, indices)), {}
        with open(self.folder / "captions.jsonl", encoding="utf-8") as file:
            for i, line in enumerate(file):
                if i in wanted:
                    found[i] = json.loads(line)[0]  # damage is a ValueError
        return [found[int(i)] for i in indices]
