"""The method is registered whenever PEFT and dvora are both imported, in either order, and PEFT only if it is used.

PEFT before dvora is in `tests/docs/test_hub.py`.
"""

import os
import subprocess
import sys

REGISTERED = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known; assert 'DVORA' in known"


def check(code: str) -> str:
    """What some lines print that run without an error in a process of their own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


NO_HOOK = "import sys; assert not any('PeftFinder' in repr(f) for f in sys.meta_path)"


def test_dvora_alone_and_then_peft_reloaded_and_with_a_look_for_peft_between() -> None:
    check(
        "import sys, importlib, dvora; assert not {'peft', 'transformers', 'matplotlib'} & set(sys.modules); "
        "importlib.reload(dvora); "
        "assert sum('PeftFinder' in repr(f) for f in sys.meta_path) == 1; "
        "from transformers.utils import is_peft_available; assert is_peft_available(); "
        f"from peft.utils import PeftType; {REGISTERED}; {NO_HOOK}; "
        "import peft; assert peft.__spec__.name == 'peft'; assert peft.__file__.endswith('__init__.py'); "
        f"importlib.reload(dvora); {REGISTERED}; {NO_HOOK}"
    )


def test_a_peft_that_does_not_fit_can_still_be_imported_and_warns() -> None:
    out = check(
        "import sys, warnings, dvora\n"
        "sys.modules['dvora.adapter_file.settings'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import peft\n"
        "print(peft.LoraConfig, [str(w.message) for w in caught if issubclass(w.category, ImportWarning)])\n"
        "try:\n    dvora.DVoRAConfig\nexcept ImportError as error:\n    print('ImportError', error)"
    )
    assert "ImportError dvora.DVoRAConfig is not available" in out
    assert "dvora's PEFT method is not available" in out
    assert "pip install '.[peft]'" in out
