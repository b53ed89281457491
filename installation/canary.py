"""PEFT's newest release, also a candidate for one, before users have it: python -m installation.canary

In an environment of its own: the tests of `tests/peft`, and PEFT's own of that version (`conformance`). What fails is
printed, with the version; PEFT's tests that changed are gone through as CONTRIBUTING says.
"""

import json
import sys
import tempfile
from pathlib import Path

from installation.environments import InstallationError, built_wheel, empty_environment
from installation.versions import TOOLS, test_results


def main() -> int:
    """Run both; 1 if anything fails."""
    failed = False
    try:
        with empty_environment() as environment, tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            # A requirement that names a pre-release admits those of its package, and of no other.
            newest = "peft>=0.dev0"
            environment.install(f"{built_wheel(environment, place)}[cli]", newest, *TOOLS)
            version = environment.versions()["peft"]
            print(f"PEFT {version}", flush=True)
            source = ("--no-deps", "--no-binary", "peft", "--dest", str(place / "source"), f"peft=={version}")
            environment.run("python", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *source)
            (archive,) = (place / "source").iterdir()
            runs = {
                "tests/peft": ("pytest", "-o", "filterwarnings=default", "tests/peft"),
                "conformance": ("conformance", f"--source={archive}"),
            }
            for name, command in runs.items():
                results = test_results(environment, *command)
                print(f"{name}: {json.dumps(results, indent=1)}", flush=True)
                failed = failed or bool(results["failures"])
    except InstallationError as error:
        print(error, file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
