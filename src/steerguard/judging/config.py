"""Which judge, reached where, with which settings.

It knows the name of the environment variable that holds a key, never the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from steerguard.errors import JudgeError
from steerguard.files import shown

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_AT = re.compile(r"(?P<model>.+?)@(?P<url>[a-z]+://.*)", re.DOTALL | re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JudgeConfig:
    """A judge. The defaults are the paper's judge: gpt-oss-120b, temperature 1.0, high reasoning effort.

    Raises:
        JudgeError: a setting that no judge can have.
    """

    model: str = "openai/gpt-oss-120b"
    "with a base URL, the name that the endpoint knows; without one, an inspect-ai name, `provider/model`"
    base_url: str | None = None
    "an OpenAI-compatible endpoint, such as http://localhost:8000/v1; None: the provider that `model` names"
    key_env: str | None = None
    "name of the environment variable that holds the key; None: no key (or, without a base URL, the provider's own)"
    temperature: float | None = 1.0
    "None: the endpoint's own"
    reasoning_effort: Effort | None = "high"
    "None: not sent, for models that do not reason"
    top_p: float | None = None
    max_tokens: int = 8192
    "the most that one verdict may take, reasoning included"
    seed: int | None = None
    "sent with the number of the draw added to it, so that draws differ; None: not sent"
    structured: bool = True
    "ask for JSON by schema; an endpoint that refuses schemas is asked again without"
    timeout: float = 300.0
    "seconds that one call may take"
    attempts: int = 5
    "calls for one verdict, the first included"
    wait: float = 1.0
    "seconds before the second call; doubled with each further one, unless the endpoint says how long"
    longest_wait: float = 60.0
    "seconds that are waited at most, whatever the endpoint says"
    concurrency: int = 8
    "calls in flight at once"
    give_up: int = 20
    "verdicts in a row that the endpoint failed to give, after which it is taken to be down"
    price_in: float | None = None
    "money per million tokens sent, in your currency"
    price_out: float | None = None
    "money per million tokens received, reasoning included"
    typical_tokens: int = 1000
    "tokens that a verdict is taken to need in an estimate, until the cache knows better"

    def __post_init__(self) -> None:
        self._check_address()
        if (self.price_in is None) != (self.price_out is None):
            raise JudgeError("a price needs both its halves: give price_in and price_out, per million tokens")
        if self.reasoning_effort not in (None, *get_args(Effort)):
            allowed = ", ".join(get_args(Effort))
            raise JudgeError(f"there is no reasoning effort {shown(self.reasoning_effort)}; there are {allowed}, or None")
        least: dict[str, float] = {
            "max_tokens": 1, "attempts": 1, "concurrency": 1, "give_up": 1, "typical_tokens": 1, "temperature": 0,
            "top_p": 0, "seed": 0, "wait": 0, "longest_wait": 0, "price_in": 0, "price_out": 0, "timeout": 1e-3,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise JudgeError(f"{name} of a judge must be at least {low:g}, got {value}")

    def _check_address(self) -> None:
        if not self.model.strip():
            raise JudgeError("a judge needs a model; give MODEL@BASE_URL, or an inspect-ai name such as openai/gpt-5")
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            # what was given may be a key: it is not repeated
            raise JudgeError("key_env must be the name of an environment variable, such as OPENAI_API_KEY, not a key itself")
        if self.base_url is None:
            if "/" not in self.model:
                raise JudgeError(
                    f"{shown(self.model)} names no endpoint; give MODEL@BASE_URL for an endpoint of yours, such as "
                    f"{self.model}@http://localhost:8000/v1, or an inspect-ai name such as openai/gpt-5"
                )
            return
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            # it may hold a key: it is not repeated
            raise JudgeError(
                "the base URL of a judge must hold no user, password, query or fragment; put the key into an "
                "environment variable and give its name"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(f"the base URL of a judge must be http://... or https://..., got {shown(self.base_url)}")

    @property
    def settings(self) -> dict[str, Any]:
        "what decides a verdict, beside what is asked; where the model runs does not"
        names = ("model", "temperature", "reasoning_effort", "top_p", "max_tokens", "seed", "structured")
        return {name: value for name, value in asdict(self).items() if name in names}

    @property
    def where(self) -> str:
        "who is sent what is judged, for people"
        return self.base_url or f"the provider {self.model.partition('/')[0]!r}"

    def money(self, tokens_in: float, tokens_out: float) -> float | None:
        """What so many tokens cost; None if the judge has no prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def judge_from(judge: str | JudgeConfig | Mapping[str, Any], **options: Any) -> JudgeConfig:
    """A judge from what a command line gives: `MODEL@BASE_URL`, or an inspect-ai name such as `openai/gpt-5`.

    Args:
        judge: that text, a mapping of `JudgeConfig` fields, or a `JudgeConfig` that the options change.
        **options: fields of `JudgeConfig`; an option of None keeps the default, so that options which were not given
            can be passed on as they are.

    Raises:
        JudgeError: an option that does not exist, or a judge that cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    fields = JudgeConfig.__dataclass_fields__
    named = given if isinstance(judge, str | JudgeConfig) else {**judge, **given}
    if unknown := sorted(set(named) - set(fields)):
        raise JudgeError(f"a judge has no option {shown(unknown[0])}; there are {', '.join(fields)}")
    if isinstance(judge, JudgeConfig):
        return replace(judge, **named)
    if isinstance(judge, str):
        at = _AT.fullmatch(judge.strip())
        named = {"model": judge.strip()} | named if at is None else {"model": at["model"], "base_url": at["url"]} | named
    return JudgeConfig(**named)
