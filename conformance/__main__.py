"""Run PEFT's own tests on DVoRA, offline, on tiny models.

python -m conformance [--record | --source ARCHIVE] [options and tests for pytest]
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from conformance.hub import build_hub
from conformance.source import copy_tests
from materials.fetch import FetchError

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "conformance"
TESTS = BUILD / "peft" / "tests"
RECORD = ROOT / "benchmarks" / "results" / "conformance.json"
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_seq_classifier.py",
    "test_target_parameters.py",
    "test_token_classification_qa.py",
    "test_tuners_utils.py",
    "test_vision_models.py",
)


def main(arguments: list[str]) -> int:
    """Fetch the tests, make the models, run pytest; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m conformance", allow_abbrev=False)
    parser.add_argument("--record", action="store_true", help="write the counts of a whole run to the result files")
    parser.add_argument("--source", type=Path, help="an archive of the installed PEFT, of a version not listed yet")
    options, whole = parser.parse_known_args(arguments)
    if options.record:
        if len(arguments) > 1:
            sys.exit("--record is for a whole run: leave the other arguments out")
        whole = [f"--record={RECORD}"]
    if options.source:
        whole += ["--of-another-version", "--continue-on-collection-errors"]
    copy_tests(TESTS, options.source)
    build_hub(BUILD / "hub")
    chosen = whole if any(argument.startswith("test_") for argument in whole) else [*whole, *FILES]
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(TESTS), *chosen]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HOME": str(BUILD / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    # Which tests PEFT skips depends on the devices that it finds.
    on_cpu = {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=TESTS, env=os.environ | offline | on_cpu, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FetchError as error:
        sys.exit(str(error))
