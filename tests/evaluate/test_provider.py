"""A guarded model as a model of Inspect's: what reaches it, what comes back, and what is kept apart."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from endpoint import Reply, serving
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ContentImage, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.backends.fake import Fault
from steerguard.errors import GuardMismatch, InputError, NotSteering
from steerguard.evaluate.engine import Engine, Request
from steerguard.evaluate.provider import guarded_model, sampling_of

ASKED = [f"Tell me the truth of day {i}." for i in range(6)]
GREEDY = GenerateConfig(temperature=0.0, max_tokens=6)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    return tmp_path / "cache"


def said(model: Any, asked: list[str] = ASKED, config: GenerateConfig = GREEDY, **options: Any) -> list[Any]:
    async def go() -> list[Any]:
        return await asyncio.gather(*(model.generate(text, config=config, **options) for text in asked))

    return asyncio.run(go())


def texts(model: sg.Backend, guards: Any = None, asked: list[str] = ASKED) -> list[str]:
    """What the backend says by itself, one by one."""
    sampling = sg.Sampling(temperature=0.0, max_new_tokens=6)
    return [model.generate(text, guards=guards, sampling=sampling)[0].text for text in asked]


# ------------------------------------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("backend", ["fake", "hf"])
def test_it_says_what_the_backend_says_and_counts_it(folder: Path, guard: sg.Guard, backend: str) -> None:
    model = load(folder, backend=backend)
    guarded = guarded_model(model, guard)
    found = said(guarded)
    assert [output.completion for output in found] == texts(model, guard) != texts(model)
    answer = model.generate(ASKED[0], guards=guard, sampling=sg.Sampling(temperature=0.0, max_new_tokens=6))[0]
    assert found[0].usage.input_tokens == len(answer.prompt_ids)
    assert found[0].usage.output_tokens == len(answer.ids)
    told = found[0].metadata["steerguard"]
    assert (told["guards"], told["tokens_moved"]) == ([guard.digest], answer.tokens_moved)
    assert answer.tokens_moved > 0


def test_twins_that_are_asked_at_once_share_a_model_and_no_batch(model: sg.Backend, guard: sg.Guard) -> None:
    plain, guarded = guarded_model(model), guarded_model(model, guard)
    assert plain.api.engine is guarded.api.engine

    async def both() -> list[Any]:
        return await asyncio.gather(*(one.generate(text, config=GREEDY) for text in ASKED for one in (plain, guarded)))

    before = len(plain.api.engine.calls)
    outputs = asyncio.run(both())
    assert [o.completion for o in outputs[::2]] == texts(model)
    assert [o.completion for o in outputs[1::2]] == texts(model, guard)
    calls = plain.api.engine.calls[before:]
    assert {kind for kind, _ in calls} == {(), (guard.digest,)}
    assert sum(rows for _, rows in calls) == 2 * len(ASKED)
    assert len(calls) <= 4  # batched, whoever came first


# ------------------------------------------------------------------------------------------------ the cache


def test_baseline_and_guarded_share_a_cache_and_no_entry(model: sg.Backend, guard: sg.Guard, cache: Path) -> None:
    other = tiny.guard(model.identity, sg.SwFC(2), guard.probes, name="honesty")
    first = {name: guarded_model(model, *guards) for name, guards in (("plain", ()), ("on", (guard,)), ("weaker", (other,)))}
    found = {name: [o.completion for o in said(one, cache=True)] for name, one in first.items()}
    assert found["plain"] == texts(model) and found["on"] == texts(model, guard) and found["weaker"] == texts(model, other)
    assert found["plain"] != found["on"] != found["weaker"]
    assert len({str(one) for one in first.values()}) == 3
    # and the cache was in use: what is asked again comes from it
    calls = len(first["on"].api.engine.calls)
    for name, guards in (("plain", ()), ("on", (guard,)), ("weaker", (other,))):
        again = said(guarded_model(model, *guards), cache=True)
        assert [o.completion for o in again] == found[name]
    assert len(first["on"].api.engine.calls) == calls
    assert len(list(cache.rglob("*"))) >= 3 * len(ASKED)


def test_without_the_digest_in_its_name_the_cache_gives_the_baseline_as_guarded(model: sg.Backend, guard: sg.Guard) -> None:
    """The trap that the name is there for: it is real in this version of Inspect."""
    plain, guarded = guarded_model(model), guarded_model(model, guard)
    baseline = [o.completion for o in said(plain, cache=True)]
    guarded.api.model_name = plain.api.model_name
    assert [o.completion for o in said(guarded, cache=True)] == baseline


def test_other_weights_and_other_backends_go_by_other_names(model: sg.Backend, folder: Path, tmp_path: Path) -> None:
    same = load(folder, backend="fake")
    other = load(tiny.llama_folder(tmp_path / "tiny", seed=1), backend="fake")
    names = [str(guarded_model(one)) for one in (model, same, other, load(folder))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_aliases_of_a_server_share_no_entry() -> None:
    """Over HTTP, with Inspect's own provider: the alias is in the model's name."""

    async def ask(url: str) -> list[str]:
        told = []
        for name in ("qwen", "qwen:honesty") * 2:
            async with get_model(f"openai-api/steerguard/{name}", base_url=url, api_key="none", memoize=False) as served:
                told.append((await served.generate("Hello", config=GREEDY, cache=True)).completion)
        return told

    with serving(lambda request: Reply(f"I am {request.body['model']}")) as endpoint:
        assert asyncio.run(ask(endpoint.url)) == ["I am qwen", "I am qwen:honesty"] * 2
        assert len(endpoint.requests) == 2


# --------------------------------------------------------------------------------------- what is honoured or refused


def test_what_is_asked_for_is_what_is_drawn(model: sg.Backend) -> None:
    plain = guarded_model(model)
    config = GenerateConfig(temperature=0.9, top_p=0.7, seed=7, max_tokens=5, stop_seqs=["q"])
    sampling = sg.Sampling(temperature=0.9, top_p=0.7, seed=7, max_new_tokens=5, stop=("q",))
    assert said(plain, ASKED[:2], config)[1].completion == model.generate(ASKED[1], sampling=sampling)[0].text
    several = said(plain, ASKED[:1], config.merge(GenerateConfig(num_choices=3)))[0]
    drawn = model.generate([ASKED[0]] * 3, sampling=sampling)
    assert [choice.message.text for choice in several.choices] == [answer.text for answer in drawn]
    assert len({answer.text for answer in drawn}) > 1
    assert several.usage.output_tokens == sum(len(answer.ids) for answer in drawn)


def test_equal_questions_at_once_are_answered_alike(model: sg.Backend) -> None:
    """What an answer is does not hang on who waited beside it."""
    outputs = said(guarded_model(model), [ASKED[0]] * 5, GenerateConfig(temperature=1.0, max_tokens=8))
    assert len({output.completion for output in outputs}) == 1


def test_what_is_left_open_is_ours() -> None:
    assert sampling_of(GenerateConfig()) == sg.Sampling()


def test_cut_off_answers_say_so(model: sg.Backend) -> None:
    assert said(guarded_model(model), ASKED[:1], GenerateConfig(max_tokens=1))[0].stop_reason == "max_tokens"


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 5}, {"frequency_penalty": 0.5}, {"logprobs": True}, {"best_of": 2}, {"reasoning_effort": "high"},
     {"extra_body": {"steering": {}}}, {"logit_bias": {1: 2.0}}],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(model: sg.Backend, setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        said(guarded_model(model), ASKED[:1], GenerateConfig(**setting))


def test_pictures_prefilled_answers_and_tools_are_refused(model: sg.Backend) -> None:
    plain = guarded_model(model)
    picture = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])
    for messages, why in (([picture], "image"), ([ChatMessageUser(content="a"), ChatMessageAssistant(content="b")], "user's")):
        with pytest.raises(InputError, match=why):
            asyncio.run(plain.generate(messages))
    from inspect_ai.tool import think

    with pytest.raises(InputError, match="tools"):
        asyncio.run(plain.generate("a", tools=[think()]))


# ------------------------------------------------------------------------------------------------ never silently off


def test_a_guard_that_does_not_act_is_no_model(folder: Path, guard: sg.Guard) -> None:
    with pytest.raises(NotSteering):
        guarded_model(load(folder, backend="fake", fault=Fault.HALF_SHIFT), guard)


def test_a_guard_of_another_model_is_no_model(tmp_path: Path, guard: sg.Guard) -> None:
    other = load(tiny.llama_folder(tmp_path / "other", seed=3), backend="fake")
    with pytest.raises(GuardMismatch):
        guarded_model(other, guard)


def test_a_baseline_that_is_guarded_is_refused(folder: Path, guard: sg.Guard) -> None:
    own = load(folder, backend="fake")
    plain = guarded_model(own)
    with own.guarded(guard), pytest.raises(NotSteering, match="without a guard"):
        said(plain, ASKED[:1])
    assert said(plain, ASKED[:1])[0].completion == texts(own)[0]
    other = load(folder, backend="fake")
    with other.guarded(guard), pytest.raises(InputError, match="guarded now"):
        guarded_model(other)


# ------------------------------------------------------------------------------------------------ by its name


def test_from_the_command_lines_options(folder: Path, guard: sg.Guard, model: sg.Backend, tmp_path: Path) -> None:
    path = guard.save(tmp_path / "honesty.guard")
    plain = get_model(f"steerguard/{folder}", backend="fake")
    guarded = get_model(f"steerguard/{folder}", backend="fake", guards=str(path))
    assert [o.completion for o in said(plain)] == texts(model)
    assert [o.completion for o in said(guarded)] == texts(model, guard)
    assert plain.api.engine is guarded.api.engine
    for wrong, why in (({"dtype": "int3"}, "no option dtype"), ({"backend": "none"}, "no backend"), ({"batch": 3}, "in use")):
        with pytest.raises(InputError, match=why):
            get_model(f"steerguard/{folder}", **({"backend": "fake"} | wrong))
    with pytest.raises(InputError, match="base URL"):
        get_model(f"steerguard/{folder}", backend="fake", base_url="http://localhost")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a stream that Inspect leaves open
def test_a_whole_task_with_epochs(model: sg.Backend, guard: sg.Guard, tmp_path: Path) -> None:
    """Epochs are drawn apart, the same at every run; a prompt that is refused fails its own sample."""
    task = Task(
        dataset=[Sample(text, target="a", id=i) for i, text in enumerate(ASKED)], solver=generate(), scorer=includes(), epochs=3,
        config=GenerateConfig(temperature=1.0, max_tokens=8),
    )  # fmt: skip
    runs = []
    for run in range(2):
        (log,) = eval(task, model=guarded_model(model, guard), log_dir=str(tmp_path / f"{run}"), log_level="warning")
        assert log.status == "success", log.error
        assert guard.digest[:16] in log.eval.model
        runs.append({(s.id, s.epoch): s.output.completion for s in log.samples or []})
    assert runs[0] == runs[1]
    assert len(runs[0]) == 18
    first = model.generate(ASKED[2], guards=guard, sampling=sg.Sampling(temperature=1.0, max_new_tokens=8, seed=43))[0]
    assert runs[0][2, 2] == first.text
    assert any(len({runs[0][i, epoch] for epoch in (1, 2, 3)}) > 1 for i in range(6))


def test_inspect_finds_it_by_its_entry_point(tmp_path: Path, folder: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["inspect_ai"].items()
    info = tmp_path / "steerguard_entry-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: steerguard-entry\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[inspect_ai]\n{name} = {value}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom inspect_ai.model import get_model\n"
    code += f"print(get_model('steerguard/{folder}', backend='fake'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("steerguard/tiny@")
    shutil.rmtree(info)


# ------------------------------------------------------------------------------------------------ the engine


class Slow:
    """A model that waits to be let through, and remembers what it was asked together."""

    def __init__(self, model: sg.Backend) -> None:
        self._model, self.gate, self.batches = model, threading.Event(), list[int]()

    def generate(self, prompts: Any, **options: Any) -> Any:
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], list):
            self.gate.wait(10)
            self.batches.append(len(prompts))
        return self._model.generate(prompts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def request(text: str, *guards: sg.Guard, role: str = "user") -> Request:
    return Request(({"role": role, "content": text},), guards, sg.Sampling(temperature=0.0, max_new_tokens=3))


def test_who_waits_is_answered_together_and_who_left_is_not(model: sg.Backend) -> None:
    slow = Slow(model)
    engine = Engine(lambda: slow, batch=4)
    futures = [engine.ask(request(text)) for text in ASKED]
    futures[5].cancel()
    slow.gate.set()
    assert [future.result()[0].text for future in futures[:5]] == [
        model.generate(text, sampling=sg.Sampling(temperature=0.0, max_new_tokens=3))[0].text for text in ASKED[:5]
    ]
    assert slow.batches == [4, 1]


def test_a_bad_neighbour_fails_alone(model: sg.Backend) -> None:
    slow = Slow(model)
    engine = Engine(lambda: slow)
    futures = [engine.ask(one) for one in (request("a"), request("b", role="nobody"), request("c"))]
    slow.gate.set()
    assert futures[0].result() and futures[2].result()
    with pytest.raises(InputError, match="nobody"):
        futures[1].result()
    # and it is nobody's company afterwards
    slow.batches.clear()
    slow.gate.clear()
    later = [engine.ask(request(text)) for text in ("d", "e", "f")]
    slow.gate.set()
    assert all(future.result() for future in later) and slow.batches == [3]


def test_a_missing_extra_is_one_sentence() -> None:
    code = "import sys\nsys.modules['inspect_ai'] = None\nfrom steerguard.errors import InputError\n"
    code += "try:\n    import steerguard.evaluate.provider\nexcept InputError as error:\n    print(error)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "steerguard[evaluate]"' in found.stdout and "\n" not in found.stdout.strip()
