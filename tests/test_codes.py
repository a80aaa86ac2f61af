import io
import json
import os

import numpy as np
import pytest
import torch

from codes import CodeFile, CodeWriter
from common import file_sha256

META = dict(tokenizer="vq.pt", tokenizer_sha256="ab" * 32, image_size=[32, 64], augmentations=["centre", "mirrored"],
            class_names=["a", "b", "c"], data="folder", split="train", notice="")


def write_codes(folder, n=9, codebook_size=256, meta=META):
    codes = torch.randint(codebook_size, (n, 2, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 3
    with CodeWriter(folder, (2, 4), codebook_size, meta) as writer:
        for first in range(0, n, 4):
            writer.write(codes[first:first + 4], labels[first:first + 4])
    return codes, labels


@pytest.mark.parametrize("n, codebook_size, dtype", [(9, 256, "uint16"), (123, 65536, "uint16"), (9, 65537, "int32")])
def test_codes_round_trip(tmp_path, n, codebook_size, dtype):
    codes, labels = write_codes(tmp_path / "codes", n, codebook_size)
    np.save(whole := io.BytesIO(), codes.numpy().astype(dtype))
    assert (tmp_path / "codes" / "codes.npy").read_bytes() == whole.getvalue()  # the header, too, is NumPy's
    file = CodeFile(tmp_path / "codes")
    assert isinstance(file.codes, np.memmap) and file.codes.dtype == dtype
    np.testing.assert_array_equal(file.codes, codes.numpy())
    np.testing.assert_array_equal(file.labels, labels.numpy())
    assert len(file) == file.meta["images"] == n and file.grid == (2, 4) and file.codebook_size == codebook_size
    assert file.class_names == ["a", "b", "c"] and file.meta["tokenizer"] == "vq.pt"
    assert sorted(p.name for p in (tmp_path / "codes").iterdir()) == ["codes.npy", "labels.npy", "meta.json"]


def test_code_batches_are_endless_resumable_and_shared_out(tmp_path):
    codes, labels = write_codes(tmp_path)
    file = CodeFile(tmp_path)
    index = {tuple(row.tolist()): (i, a) for i, views in enumerate(codes) for a, row in enumerate(views)}
    steps = [file.code_batch(step, 6, seed=5) for step in range(30)]
    drawn = [index[tuple(row.tolist())] for x, _ in steps for row in x]
    assert [labels[i] for i, _ in drawn] == torch.cat([y for _, y in steps]).tolist()
    for first in range(0, 180, 9):  # each epoch holds each picture once
        assert sorted(i for i, _ in drawn[first:first + 9]) == list(range(9))
    assert 60 < sum(a for _, a in drawn) < 120  # both augmentations
    assert steps[0][0].dtype == steps[0][1].dtype == torch.int64
    again = [file.code_batch(7, 6, seed=5, rank=r, world=2)[0] for r in range(2)]
    assert torch.equal(torch.cat(again), steps[7][0])
    assert not torch.equal(file.code_batch(0, 6, seed=6)[0], steps[0][0])
    with pytest.raises(ValueError, match="cannot be shared"):
        file.code_batch(0, 6, seed=0, world=4)


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in (meta | changes).items() if v != "gone"}))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "codes.npy").unlink(), "codes.npy is not there"),
    (lambda f: (f / "meta.json").unlink(), "meta.json is not there"),
    (lambda f: (f / "codes.npy").write_bytes((f / "codes.npy").read_bytes()[:-5]), "codes.npy is truncated"),
    (lambda f: (f / "labels.npy").write_bytes((f / "labels.npy").read_bytes()[:-5]), "labels.npy is truncated"),
    (lambda f: (f / "meta.json").write_text('{"version"'), "meta.json is truncated"),
    (lambda f: np.save(f / "labels.npy", np.full(9, 3)), r"labels in .*labels.npy .* outside 0..2"),
    (lambda f: np.save(f / "labels.npy", np.zeros(8, np.int64)), r"labels.npy is int64 \(8,\)"),
    (lambda f: np.save(f / "codes.npy", np.full((9, 2, 8), 256, np.uint16)), r"codes in .*codes.npy .* outside 0..255"),
    (lambda f: np.save(f / "codes.npy", np.zeros((9, 2, 8), np.int64)), "codes.npy is int64"),
    (lambda f: edit_meta(f, grid=[4, 4]), "4 x 4 codes"),
    (lambda f: edit_meta(f, version=1), "version 1"),
    (lambda f: edit_meta(f, tokenizer_sha256="gone"), "lacks tokenizer_sha256"),
    (lambda f: CodeFile(f).check(tokenizer_sha256="cd" * 32), "tokenizer vq.pt. has the tokenizer_sha256"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_code_files_refuse_what_does_not_match(tmp_path, damage, message):
    write_codes(tmp_path)
    CodeFile(tmp_path).check(tokenizer_sha256="ab" * 32)
    with pytest.raises(ValueError, match=message):
        damage(tmp_path)
        CodeFile(tmp_path)


def test_code_writer_leaves_nothing_half_done(tmp_path):
    codes, labels = write_codes(tmp_path / "kept")
    with pytest.raises(KeyError), CodeWriter(tmp_path / "kept", (2, 4), 256, META) as writer:
        writer.write(codes[:2], labels[:2])
        raise KeyError("killed")
    np.testing.assert_array_equal(CodeFile(tmp_path / "kept").codes, codes.numpy())  # the old files
    assert len(list((tmp_path / "kept").iterdir())) == 3
    for bad, message in [((codes[:2], labels[:3]), "do not fit"), ((codes[:2, :1], labels[:2]), "do not fit"),
                         ((codes[:2] + 256, labels[:2]), "codes reach"), ((codes[:2], labels[:2] - 3), "labels reach")]:
        with pytest.raises(ValueError, match=message), CodeWriter(tmp_path / "x", (2, 4), 256, META) as writer:
            writer.write(*bad)
    with pytest.raises(ValueError, match="lacks tokenizer"):
        CodeWriter(tmp_path / "x", (2, 4), 256, {})
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux and BSD have a full disk to open")
@pytest.mark.parametrize("batches", [1, 200], ids="batches {}".format)  # the first is written at the end only
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, batches):
    codes, labels = write_codes(tmp_path / "kept")
    with pytest.raises(OSError, match="No space left on device: '.*kept'"):
        with CodeWriter(tmp_path / "kept", (2, 4), 256, META) as writer:
            writer.file.close()
            writer.file = open("/dev/full", "wb")
            for _ in range(batches):
                writer.write(codes, labels)
    np.testing.assert_array_equal(CodeFile(tmp_path / "kept").codes, codes.numpy())
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_file_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")
