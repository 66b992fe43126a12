"""Budgets: what judging may cost, what it would cost, and what it has cost.

A limit is kept beforehand, not regretted afterwards: a call is only begun if the most that it can take still fits beside
the most that the calls in flight can take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from steerguard.errors import JudgeError, SpendLimitReached
from steerguard.judging.config import JudgeConfig


@dataclass(frozen=True)
class SpendLimit:
    """The most that may be spent; None: no limit of that kind."""

    calls: int | None = None
    "requests, failed ones included"
    tokens: int | None = None
    "tokens sent and received"
    money: float | None = None
    "in the currency of the judges' prices; every judge needs prices"

    def __post_init__(self) -> None:
        for name in ("calls", "tokens", "money"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise JudgeError(f"a limit on {name} must be at least 0, got {value}")


@dataclass(frozen=True)
class Spent:
    """What was spent."""

    calls: int = 0
    "requests, failed ones included"
    failed: int = 0
    "requests that brought no verdict"
    tokens_in: int = 0
    tokens_out: int = 0
    money: float | None = 0.0
    "None if a judge that was called has no prices"
    unmetered: int = 0
    "requests whose tokens the endpoint did not tell; they are taken to have cost the most that they could"
    cached: int = 0
    "verdicts that were there already and cost nothing"

    def __str__(self) -> str:
        rest = [f"{self.tokens_in + self.tokens_out:,} tokens"]
        rest += [] if self.money is None else [f"cost {self.money:.4f}"]
        rest += [f"{self.cached} verdicts from the cache"] if self.cached else []
        rest += [f"{self.failed} calls without a verdict"] if self.failed else []
        rest += [f"{self.unmetered} calls whose tokens are taken at their most"] if self.unmetered else []
        return f"{self.calls} calls, {', '.join(rest)}"


@dataclass(frozen=True)
class Estimate:
    """What judging would cost if every call succeeds at once."""

    verdicts: int
    "that are needed, each once"
    cached: int
    "of them in the cache already"
    tokens_in: int
    tokens_out: int
    "from the tokens of verdicts in the cache, else from `typical_tokens`"
    money: float | None
    "None if a judge has no prices"
    most: float | None
    "money if every verdict took `max_tokens`"

    @property
    def calls(self) -> int:
        return self.verdicts - self.cached

    def __str__(self) -> str:
        told = f"about {self.calls} calls and {self.tokens_in + self.tokens_out:,} tokens ({self.cached} verdicts are cached)"
        return told if self.money is None else f"{told}, cost about {self.money:.4f} and at most {self.most:.4f}, retries apart"


@dataclass(frozen=True)
class Hold:
    """The most that one call can take."""

    judge: JudgeConfig
    tokens_in: int
    tokens_out: int

    @property
    def money(self) -> float:
        return self.judge.money(self.tokens_in, self.tokens_out) or 0.0


class Budget:
    """A limit and what was spent under it; scorers and tournaments that share one share the limit.

    Not for several threads at once.
    """

    def __init__(self, limit: SpendLimit | None = None) -> None:
        self.limit = limit or SpendLimit()
        self.spent = Spent()
        self._held: list[Hold] = []

    def check_prices(self, judge: JudgeConfig) -> None:
        """Raise JudgeError if money is limited and the judge has no prices."""
        if self.limit.money is not None and judge.price_in is None:
            raise JudgeError(
                f"a limit on money needs the prices of every judge, and {judge.model} has none; give price_in and "
                "price_out, or limit calls or tokens"
            )

    @property
    def idle(self) -> bool:
        "whether no call is in flight"
        return not self._held

    def short(self, hold: Hold) -> str | None:
        """Which limit a call might break, in words; None if it fits beside the calls in flight."""
        holds = [*self._held, hold]
        tokens = self.spent.tokens_in + self.spent.tokens_out + sum(h.tokens_in + h.tokens_out for h in holds)
        money = (self.spent.money or 0.0) + sum(h.money for h in holds)
        needs = {"calls": self.spent.calls + len(holds), "tokens": tokens, "money": money}
        for name, needed in needs.items():
            limit = getattr(self.limit, name)
            if limit is not None and needed > limit:
                allowed = f"a cost of {limit:g}" if name == "money" else f"{limit:g} {name}"
                return f"{allowed} ({needed:g} might be needed with the next call)"
        return None

    def found(self, cached: int) -> None:
        """So many verdicts were there already."""
        self.spent = replace(self.spent, cached=self.spent.cached + cached)

    def hold(self, hold: Hold) -> None:
        self._held.append(hold)

    def settle(self, hold: Hold, *, usage: tuple[int, int] | None, verdict: bool) -> None:
        """A call has ended: what it held becomes what it took.

        Args:
            usage: tokens sent and received; None if the endpoint did not tell: then all that was held is counted.
        """
        self._held.remove(hold)
        tokens_in, tokens_out = (hold.tokens_in, hold.tokens_out) if usage is None else usage
        cost, before = hold.judge.money(tokens_in, tokens_out), self.spent.money
        self.spent = replace(
            self.spent,
            calls=self.spent.calls + 1,
            failed=self.spent.failed + (not verdict),
            tokens_in=self.spent.tokens_in + tokens_in,
            tokens_out=self.spent.tokens_out + tokens_out,
            money=None if before is None or cost is None else before + cost,
            unmetered=self.spent.unmetered + (usage is None),
        )

    def reached(self, short: str, kept: int, missing: int, where: str) -> SpendLimitReached:
        """The error that says what was kept and how to go on."""
        return SpendLimitReached(
            f"the spend limit is reached: {short}; spent are {self.spent}. {kept} verdicts of this run are kept {where}, "
            f"{missing} are missing; raise the limit and run the same again: only what is missing is asked"
        )
