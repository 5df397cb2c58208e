"""What looks at the encoder while it is pretrained: a probe, and a watch.

Both encode a fixed set of whole images, never masked ones, before the first step and at
the end of epochs, in evaluation mode and without gradients. Neither changes the run:
weights, random numbers, the mode of every module and what a resumed run does stay what
they are without them.
"""

from lightly_mim.monitoring.images import check_finite_images
from lightly_mim.monitoring.probe import OnlineProbe, Probe
from lightly_mim.monitoring.watch import FeatureWatch

__all__ = ["FeatureWatch", "OnlineProbe", "Probe", "check_finite_images"]
