"""The surgery histories: a model is adapted, trained, merged, cast, copied, saved and compiled in any order.

After every step it is compared with its reference: values to the last bit, outputs and updates with dense float64.
"""

from tests.tuner.surgery.surgery_adapters import AdapterRules
from tests.tuner.surgery.surgery_combining import CombiningRules
from tests.tuner.surgery.surgery_copies import CopyRules
from tests.tuner.surgery.surgery_passes import PassRules


class Surgery(AdapterRules, CombiningRules, CopyRules, PassRules):
    """All rules."""
