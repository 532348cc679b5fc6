# SPDX-License-Identifier: Apache-2.0
"""Runs of ``python -m seer_cuda distill`` on a tiny local model and a little text."""

import csv

from hf_models import make_model

from seer_cuda import cli

SMALL = ["--context", "160", "--batch", "2", "--accumulate", "2", "--steps", "6", "--warm-up", "2"]


def make_folders(root, family="qwen3", **options):
    """A local model with a tokenizer of bytes in root/model, and root/text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "model")
    make_model(family, vocab_size=256, **options).save_pretrained(root / "model")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("\n".join(f"{n} squared is {n * n}." for n in range(400)))
    (root / "text" / "b.bin").write_bytes(b"\xff\xfe\x00")
    return root


def arguments(folders, out, *more):
    """Of the command line; later options win."""
    paths = ["--model", folders / "model", "--text", folders / "text", "--out", out]
    return ["distill", *map(str, paths), *SMALL, "--device", "cpu", *map(str, more)]


def distill(folders, out, *more):
    """Exit code of a run."""
    return cli.main(arguments(folders, out, *more))


def rows(folder):
    """log.csv without its last column, the seconds."""
    return [row[:-1] for row in csv.reader((folder / "log.csv").open())]
