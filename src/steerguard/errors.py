"""Everything that steerguard refuses to do, as one tree of errors.

    SteerguardError
    ├── InputError            what the caller gave cannot be used (exit status 2 on the command line)
    │   ├── RuleError         a rule, a strength, or a rule and a probe that do not go together
    │   ├── TraitError        a trait folder, or one line of it
    │   ├── ModelError        a model that cannot be loaded, or whose residual stream cannot be found
    │   ├── PromptError       messages that cannot be rendered, or an answer that cannot be found again
    │   ├── ContrastError     answers from which no direction can be learnt
    │   │   └── WeakProbe     there are answers, but no direction that reads held-out ones
    │   ├── GuardFileError    a damaged, foreign or hostile guard file
    │   ├── FitFileError      the same of a file of fitted probes
    │   ├── DirectionError    another tool's directions: their file, or a model that they do not fit
    │   ├── RecipeError       a recipe, or one setting of it
    │   ├── ResultError       the same of a file of a sweep's figures
    │   ├── GuardMismatch     a sound guard, made for another model
    │   ├── JudgeError        a judge, its endpoint or its cache that cannot be used
    │   │   └── SpendLimitReached   judging would cost more than was allowed; what was judged is kept
    │   └── OutputExists      a file that would be overwritten
    └── SteeringError         steering was asked for and cannot be shown to act
        ├── NotSteering       a hook did not fire, or moved the residual by something else than the rule says
        └── Unsupported       this model, cache or decoding method cannot be steered rightly, so it is not

Every message says what, what was got, what is allowed, and the next step. Nothing here is ever caught and
turned into a warning: an unguarded answer is never sent in place of a guarded one.
"""

from __future__ import annotations


class SteerguardError(Exception):
    """The root of every error that steerguard raises on purpose."""


class InputError(SteerguardError):
    """What the caller gave cannot be used; nothing was changed."""


class RuleError(InputError):
    """A rule that does not exist, a strength it cannot have, or a probe it cannot be compiled with."""


class TraitError(InputError):
    """A trait folder that cannot be read; the message names the file and the line."""


class ModelError(InputError):
    """A model that cannot be loaded, or whose decoder blocks or residual cannot be found."""


class PromptError(InputError):
    """Messages that the model's chat template cannot render."""


class ContrastError(InputError):
    """Too few answers, one class only, empty answers, or activations that are not finite."""


class WeakProbe(ContrastError):
    """No direction reads held-out answers better than chance; steering along it would be steering along noise."""


class GuardFileError(InputError):
    """A guard file that is truncated, oversized, of another format or not what it says it is."""


class FitFileError(InputError):
    """A file of fitted probes that is not there, damaged, or of another format."""


class DirectionError(InputError):
    """A file of directions that cannot be read safely, or directions that do not fit the model."""


class RecipeError(InputError):
    """A recipe that cannot be read, or a setting in it that cannot be."""


class ResultError(InputError):
    """A file of a sweep's figures that is not there, damaged, or of another format."""


class GuardMismatch(InputError):
    """A guard asked to steer a model that it was not made for."""

    def __init__(self, message: str, differs: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differs = differs
        """""What differs, by name. All but width and depth may be waived, by name, with `allow_mismatch=`."""""


class JudgeError(InputError):
    """A judge that cannot be asked: its settings, key, endpoint or cache. What was judged is kept."""


class SpendLimitReached(JudgeError):
    """The next call might cost more than was allowed. What was judged is kept."""


class OutputExists(InputError):
    """A file stands where the result would be written."""


class SteeringError(SteerguardError):
    """Steering was asked for and cannot be shown to act. Nothing stays installed."""


class NotSteering(SteeringError):
    """A hook did not fire, fired on the wrong rows, or did not move the residual as the rule says."""


class Unsupported(SteeringError):
    """What was asked for cannot be steered rightly here, so it is refused rather than done wrongly."""
