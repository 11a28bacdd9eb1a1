"""Text-based person anomaly retrieval: public functions, and the code that the models share.

The public functions are ``load_encoder``, ``load_scores``, ``fuse``, ``rank`` and ``evaluate``
(docs/library.md). Each function is imported at its first use, so ``import pab`` stays fast.

The subpackages and modules, in layers; each layer builds on those above it:

* ``core``: files, configs, devices.
* ``data``: annotations, images.
* ``scores``, ``ranking``, ``metrics``, ``evaluate``, ``api``, ``compare``, ``fetch``,
  ``export_weights``, ``formats`` and ``layout``.
* ``scoring``, ``training`` and ``encoders`` (CLIP, BLIP-2, vision-language models).
* ``search``.

``mini`` renders a small synthetic data set. ``lhp``, ``uit`` and ``ensemble`` build on this
package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pab.core import __version__ as __version__

if TYPE_CHECKING:
    from ensemble.api import fuse
    from pab.api import evaluate, rank
    from pab.scores import load_scores
    from pab.scoring.members import load_encoder

__all__ = ["evaluate", "fuse", "load_encoder", "load_scores", "rank"]
_HOMES = {
    "evaluate": "pab.api",
    "fuse": "ensemble.api",
    "load_encoder": "pab.scoring.members",
    "load_scores": "pab.scores",
    "rank": "pab.api",
}


def __getattr__(name: str) -> Any:
    """Import a public function at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the names of this module and the public functions."""
    return sorted({*globals(), *__all__})
