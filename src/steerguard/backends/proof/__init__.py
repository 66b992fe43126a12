"""Proof that a backend steers: what entering `guarded` runs, and what `steerguard check` prints.

Each check asks the model through the protocol alone (`generate`, `residuals`, `logits`) and compares what comes back
with arithmetic of its own (`canary`), in float64, written from the six numbers and not from the kernel. The checks
steer with canaries: the guard's own directions, layers and model with a rule whose effect is known whatever the prompt,
so that a gate that happens to be shut on a short prompt is still shown to work.

This module knows the protocol and numpy. It knows no backend, no torch, and no rule but those that its canaries use.

What sees what: `effect` a hook that does not fire, whose result is lost, that acts on another layer, by another amount
or in another precision; `knee` a gate that is ignored; `rule` and `order` another rule or another order than asked for;
`shut` anything that is not exactly off; `rows` a row that is missed or that touches its neighbour; `decode` decoded
tokens that are missed; `response` positions miscounted; `isolation` a cache that carries one call's guards into
another; `proven` what is not undone; `audit`, at the end of every call, a gate that stopped looking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Answer, Backend, Floats, Sampling
from steerguard.backends.proof.canary import (
    ANSWER,
    FAR_BELOW,
    PROMPTS,
    STEPS,
    Canary,
    aimed,
    compare,
    shift,
    tolerance,
)
from steerguard.errors import NotSteering
from steerguard.guard import Guard, Positions
from steerguard.rules import Floor, Target


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    "name of the check"
    passed: bool
    detail: str
    "what was measured; where it failed, what was expected"

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'} {self.check}: {self.detail}"


def prove(model: Backend, guards: Sequence[Guard]) -> list[Finding]:
    """Every check of these guards on this model, in the order of `CHECKS`. Nothing stays installed.

    What is entered already stays so and is taken as the model. Errors other than NotSteering are raised.
    """
    canary = Canary(model, tuple(guards))
    findings = []
    for name, check in CHECKS.items():
        try:
            findings.append(Finding(name, True, check(canary)))
        except NotSteering as error:
            findings.append(Finding(name, False, str(error)))
    return findings


def examine(model: Backend, guards: Sequence[Guard]) -> list[Finding]:
    """`prove`, and then whether `model.guarded` lets them in and leaves nothing behind."""
    findings = prove(model, guards)
    try:
        with model.guarded(*guards):
            pass
    except NotSteering as error:
        return [*findings, Finding("guarded", False, str(error))]
    return [*findings, Finding("guarded", True, "entered with the same effect, and undone bit for bit")]


@contextmanager
def proven(model: Backend, guards: Sequence[Guard], installed: AbstractContextManager[Backend]) -> Iterator[Backend]:
    """Enter `installed`, the backend's plain installation of these guards, with a proof before and after.

    Raises:
        NotSteering: on entry, if a check fails or if entering has another effect than giving the guards with a call; on
            leaving, if the model is not what it was. On entry nothing stays installed.
    """
    if not guards:
        with installed:
            yield model
        return
    canary = Canary(model, tuple(guards))
    before = canary.base, canary.base_logits
    failed = [finding for finding in prove(model, guards) if not finding.passed]
    if failed:
        named = "; ".join(f"{finding.check}: {finding.detail}" for finding in failed)
        raise NotSteering(f"{_names(guards)} cannot be shown to steer {model.identity.name!r} on {model.name}. {named}")
    expected = _read(model, guards)
    try:
        with installed:
            if not all(map(canary.same, _read(model, ()), expected)):
                raise NotSteering(f"{_names(guards)}: entered guards act otherwise than the same guards given with a call")
            yield model
    finally:
        if not all(map(canary.same, _read(model, ()), before)):
            raise NotSteering(
                f"{_names(guards)} left something behind: the residuals are not those of before. Load the model again"
            )


def audit(guards: Sequence[Guard], prompt_length: int, tokens: int, seen: int) -> None:
    """Raise NotSteering unless the gates of a row looked at every token that their positions name.

    Args:
        tokens: how many of the row's tokens the model read (the last generated one is never read).
        seen: token-gate pairs that the hooks counted themselves.
    """
    expected = sum(len(guard.probes) * (tokens if guard.positions == "all" else tokens - prompt_length) for guard in guards)
    if seen != expected:
        raise NotSteering(
            f"{_names(guards)} looked at {seen} token-gate pairs of {tokens} tokens, expected {expected}: a hook did "
            "not fire, or not at every token. The answer is withheld"
        )


# ----------------------------------------------------------------------------------------------------- checks


def _effect(canary: Canary) -> str:
    """A canary moves every token at its layer by what it says, and what comes after reads it."""
    worst = 0.0
    for layer, _, probe, _, guard in canary.gates:
        loud = canary.loud(guard, 0.5, layers=[layer])
        (gate,) = (gate for _, gate in loud.gates())
        after = canary.residuals(loud)
        worst = max(worst, compare(canary, after[layer], canary.base[layer], probe, gate, 0, f"layer {layer}"))
        if not canary.same(after[:layer], canary.base[:layer]):
            raise NotSteering(f"a guard on layer {layer} changed a layer before it")
        later = [i for i in range(layer + 1, len(after)) if np.array_equal(after[i], canary.base[i])]
        if later or np.array_equal(canary.model.logits(PROMPTS[0], ANSWER, guards=loud), canary.base_logits):
            raise NotSteering(f"layer {layer} was moved, but {f'layers {later}' if later else 'the logits'} did not change")
    layers = sorted({entry[0] for entry in canary.gates})
    return f"every token moved at layers {layers} as it should, the largest error {worst:.1e} of the shift"


def _rule(canary: Canary) -> str:
    """Each gate, after those before it, does to each token what its six numbers say."""
    moved = total = 0
    before = canary.base
    for k, (layer, i, probe, gate, guard) in enumerate(canary.gates):
        after = canary.residuals(*_prefix(canary, k + 1))
        first = 0 if guard.positions == "all" else canary.answer_start
        compare(canary, after[layer], before[layer], probe, gate, first, f"guard {i} on layer {layer}")
        moved += int((shift(before[layer] @ probe.v, gate)[first:] != 0).sum())
        total += after.shape[1] - first
        before = after
    return f"{moved} of {total} tokens of the canary text moved, each as the rule says"


def _prefix(canary: Canary, k: int) -> list[Guard]:
    """The guards with only the first k gates that act."""
    acting = {(layer, i) for layer, i, *_ in canary.gates[:k]}
    kept = [tuple(p for p in guard.probes if (p.layer, i) in acting) for i, guard in enumerate(canary.guards)]
    return [replace(guard, probes=probes) for guard, probes in zip(canary.guards, kept, strict=True) if probes]


def _knee(canary: Canary) -> str:
    """A floor at the median lifts one half of the tokens to it and leaves the other half bit for bit."""
    for layer, _, probe, _, guard in canary.gates:
        floor = canary.one(guard, probe, Floor(float(np.median(canary.base[layer] @ probe.v))))
        (gate,) = (gate for _, gate in floor.gates())
        compare(canary, canary.residuals(floor)[layer], canary.base[layer], probe, gate, 0, f"a floor on layer {layer}")
    return "tokens above the knee are left bit for bit, those below it are moved"


def _order(canary: Canary) -> str:
    """Of two guards on one layer, the second sees what the first left."""
    layer, _, probe, _, guard = canary.gates[0]
    size = canary.size(layer)
    one, other = (canary.one(guard, aimed(probe, s), Target(0.0)) for s in (-size, size))
    after = canary.residuals(one, other)
    error = np.abs(after[layer].astype(np.float64) @ probe.v - size)
    if not (error <= tolerance(canary, after[layer]).max(-1) * 8).all():
        raise NotSteering(f"two guards on layer {layer} left projections {error.max():.3g} from what their order gives")
    return f"two guards on layer {layer} act one after the other"


def _shut(canary: Canary) -> str:
    """A live gate that no token reaches changes not one bit."""
    shut = [replace(guard, rule=Floor(FAR_BELOW)) for guard in canary.guards]
    same = canary.same(canary.residuals(*shut), canary.base)
    if not same or not canary.same(canary.model.logits(PROMPTS[0], ANSWER, guards=shut), canary.base_logits):
        raise NotSteering("a shut gate changed the residuals or the logits")
    plain = canary.generate(PROMPTS, [()] * len(PROMPTS))
    guarded = canary.generate(PROMPTS, [tuple(shut)] * len(PROMPTS))
    if [(a.ids, a.text) for a in plain] != [(a.ids, a.text) for a in guarded]:
        raise NotSteering("a shut gate changed the text")
    return "a shut gate leaves residuals, logits and text bit for bit"


def _rows(canary: Canary) -> str:
    """Guarded rows around an unguarded one: each is what it is alone."""
    for sign in (4.0, -4.0):
        loud = tuple(canary.loud(guard, sign) for guard in canary.guards)
        watching = canary.witnesses(loud)
        rows = [(*loud, *watching), watching, (*loud, *watching)]
        together = canary.generate(PROMPTS, rows)
        for i, answer in enumerate(together):
            alone = canary.generate(PROMPTS[i : i + 1], [rows[i]])[0]
            what = f"row {i} of a batch, {'guarded' if i != 1 else 'between guarded rows'},"
            _agree(canary, answer, alone, PROMPTS[i], rows[i], what)
    return "each row of a batch is what it is alone, guarded or not"


def _decode(canary: Canary, positions: Positions = "all") -> str:
    """What generation did, token by token, is what one forward over the whole sequence does."""
    steps = 0
    for sign in (4.0, -4.0):
        loud = tuple(canary.loud(guard, sign, positions=positions) for guard in canary.guards)
        row = (*loud, *canary.witnesses(loud))
        answers = canary.generate(PROMPTS[:2], [row] * 2)
        for answer, prompt in zip(answers, PROMPTS, strict=False):
            _regreedy(canary, answer, _reread(canary, answer, prompt, row))
        for seed in range(8):  # a model that ends its turn at once shows no decoded token: draw some
            if any(len(answer.ids) > 2 for answer in answers):
                break
            drawn = Sampling(temperature=3.0, top_p=1.0, seed=seed, max_new_tokens=STEPS)
            answers = canary.generate(PROMPTS[:2], [row] * 2, drawn)
            for answer, prompt in zip(answers, PROMPTS, strict=False):
                _reread(canary, answer, prompt, row)
        steps += sum(len(answer.ids) - 1 for answer in answers)
    if steps == 0:
        raise NotSteering("the model ended every turn at its first token, so that no decoded token could be looked at")
    return f"{steps} decoded tokens steered as in one forward over the whole sequence"


def _reread(canary: Canary, answer: Answer, prompt: str, row: tuple[Guard, ...]) -> Floats:
    """Compare the traces of an answer with the residuals of its own tokens, read again in one forward.

    The second half of `row` are witnesses. Returns the logits `[tokens, vocabulary]` of that forward.
    """
    again, logits = canary.reread(prompt, answer.ids[:-1], row)
    start, outer = len(answer.prompt_ids), 1 + answer.traces[-1].guard - len(row)  # guards that were entered before
    for trace in answer.traces[-sum(len(guard.probes) for guard in row) :]:
        guard = row[trace.guard - outer]
        h, (probe, gate) = again[trace.layer], next(pair for pair in guard.gates() if pair[0].layer == trace.layer)
        where = f"generation at layer {trace.layer} (prompt length {start}):"
        # 1. the gate looked at every token that was read
        looked = int(np.isfinite(trace.rho + trace.delta).sum())
        if not len(trace.rho) == looked == len(h):
            raise NotSteering(f"{where} {looked} tokens were looked at, {len(h)} were read")
        # 2. and did to it what the rule says
        scope = np.arange(len(h)) >= (0 if guard.positions == "all" else start)
        delta = np.where(scope, shift(trace.rho, gate), 0)
        _refuse(~(np.abs(trace.delta - delta) <= 1e-4 * canary.size(trace.layer)), f"{where} not moved as the rule says")
        # 3. witnesses act last: what they saw is what the others left, here and at every layer after
        if trace.guard - outer >= len(row) // 2:
            limit = canary.loose * np.linalg.norm(h.astype(np.float64), axis=-1)
            _refuse(~(np.abs(trace.rho - h.astype(np.float64) @ probe.v) <= limit), f"{where} not as in one forward")
    return logits


def _regreedy(canary: Canary, answer: Answer, logits: Floats) -> None:
    """Each greedy token is the likeliest (up to a tie) when its sequence is read again in one forward."""
    logits = logits[len(answer.prompt_ids) - 1 :]
    short = logits.max(-1) - logits[np.arange(len(logits)), list(answer.ids)]
    _refuse(~(short <= canary.loose * logits.std(-1)), "generation took other tokens than one forward makes likeliest")


def _refuse(wrong: npt.NDArray[np.bool_], what: str) -> None:
    if wrong.any():
        raise NotSteering(f"{what}: positions {np.nonzero(wrong)[0].tolist()}")


def _response(canary: Canary) -> str:
    """Positions `response` leave the prompt bit for bit and move every token of the answer, decoded or read."""
    start = canary.answer_start
    for layer, _, probe, _, guard in canary.gates:
        loud = canary.loud(guard, 0.5, layers=[layer], positions="response")
        (gate,) = (gate for _, gate in loud.gates())
        after = canary.residuals(loud)
        if not canary.same(after[:, :start], canary.base[:, :start]):
            raise NotSteering(f"a response guard on layer {layer} moved a token of the prompt")
        compare(canary, after[layer], canary.base[layer], probe, gate, start, f"a response guard on layer {layer}")
    return f"the prompt is left bit for bit; {_decode(canary, 'response')}"


def _isolation(canary: Canary) -> str:
    """A guarded call between two equal unguarded ones changes neither, nor does the first reach into it."""
    loud = tuple(canary.loud(guard, 4.0) for guard in canary.guards)
    watched = canary.witnesses(loud)
    guarded = (*loud, *watched)
    first = canary.generate(PROMPTS[:1], [watched])[0]
    between = canary.generate(PROMPTS[:1], [guarded])[0]
    last = canary.generate(PROMPTS[:1], [watched])[0]
    _reread(canary, between, PROMPTS[0], guarded)
    _agree(canary, last, first, PROMPTS[0], watched, "an unguarded answer after a guarded one")
    return "a guarded call leaves nothing in the cache for the next one"


CHECKS: dict[str, Callable[[Canary], str]] = {
    "effect": _effect,
    "rule": _rule,
    "knee": _knee,
    "order": _order,
    "shut": _shut,
    "rows": _rows,
    "decode": _decode,
    "response": _response,
    "isolation": _isolation,
}
"""Every check by name; each returns what it found, or raises NotSteering with what is wrong."""


def _agree(canary: Canary, a: Answer, b: Answer, prompt: str, row: tuple[Guard, ...], what: str) -> None:
    """Two greedy answers to one prompt under the same guards are the same: tokens (up to a tie) and traces."""
    pairs = zip(a.ids, b.ids, strict=False)
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.ids), len(b.ids)))
    if a.ids != b.ids and (same == min(len(a.ids), len(b.ids)) or not _tied(canary, prompt, row, a, b, same)):
        raise NotSteering(f"{what} has other tokens than it should: {a.ids}, not {b.ids}")
    read = min(len(a.prompt_ids) + same, len(b.prompt_ids) + len(b.ids) - 1)
    for s, t in zip(a.traces, b.traces, strict=True):
        rho, delta = t.rho[:read], t.delta[:read]
        limit = canary.loose * (canary.size(t.layer) + np.abs(rho))
        if len(s.rho) < read or len(rho) < read or not (np.abs(s.rho[:read] - rho) <= limit).all():
            raise NotSteering(f"{what} has other projections on layer {t.layer} than it should")
        if not (np.abs(s.delta[:read] - delta) <= limit).all():
            raise NotSteering(f"{what} was moved otherwise on layer {t.layer} than it should")


def _tied(canary: Canary, prompt: str, row: tuple[Guard, ...], a: Answer, b: Answer, i: int) -> bool:
    """Whether the tokens i of two answers, equal before, are as likely as each other but for rounding."""
    logits = canary.reread(prompt, b.ids[:i], row)[1][-1]
    return abs(float(logits[a.ids[i]]) - float(logits[b.ids[i]])) <= canary.loose * float(logits.std())


def _read(model: Backend, guards: Sequence[Guard]) -> tuple[Floats, Floats]:
    """Residuals and logits of the canary text."""
    return model.residuals(PROMPTS[0], ANSWER, guards=guards), model.logits(PROMPTS[0], ANSWER, guards=guards)


def _names(guards: Sequence[Guard]) -> str:
    return "guard " + ", ".join(repr(guard.name) for guard in guards)
