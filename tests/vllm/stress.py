"""A crowd of clients that ask one server at once, each under a configuration of its own, and some of whom leave.

What each should be answered is asked beforehand, one at a time, of the same server. Sums of floating-point numbers
depend on the size of a batch, so an answer is compared up to the first token whose runner-up is as likely to the last
digits.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from processes import STEPS, Server

Guards = list[Any]
TIE = 1e-3
"""Logprobs closer than this may change places with the size of a batch."""


def configurations() -> list[Guards]:
    """What a request may choose of `processes.three_guards`: nothing, each alone, in either order, at many strengths."""
    fixed: list[Guards] = [[], ["still"], ["mirroring"], ["still", "mirroring"], ["mirroring", "still"]]
    strengths = [step / 2 for step in range(-12, 17)]
    pushed = [
        {"name": "pushing", "strength": strength, "positions": positions}
        for strength in strengths
        for positions in ("all", "response")
    ]
    return [*fixed, *([one] for one in pushed), *(["still", one] for one in pushed[::3])]


@dataclass(frozen=True)
class Known:
    """An answer of the server to one request alone."""

    ids: tuple[int, ...]
    text: str
    sure: int
    "tokens before the first that is nearly a tie"


@dataclass
class Crowd:
    """Clients, what they know, and what became of them."""

    server: Server
    configurations: Sequence[Guards]
    prompts: Sequence[str]
    seed: int
    known: dict[tuple[str, str], Known] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    "connections that ended before their answer"
    finished: int = 0
    cancelled: int = 0
    disconnected: int = 0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def text(self, prompt: str, guards: Guards) -> str:
        return self.known[prompt, json.dumps(guards)].text

    def learn(self) -> None:
        """Ask for every prompt under every configuration, one after the other."""
        with httpx.Client(base_url=self.server.url, timeout=300) as client:
            for guards in self.configurations:
                for prompt in self.prompts:
                    said = client.post("/v1/chat/completions", json=_body(prompt, guards, logprobs=True, top_logprobs=2))
                    assert said.status_code == 200, said.text
                    self.known[prompt, json.dumps(guards)] = _known(said.json()["choices"][0])

    def run(self, requests: int, *, at_once: int) -> None:
        """Ask that many times, so many at once."""
        asyncio.run(self._run(requests, at_once))

    async def _run(self, requests: int, at_once: int) -> None:
        gate = asyncio.Semaphore(at_once)
        # a connection for each: one that is kept may be closed by the server, or with a client who leaves, as it is used again
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, limits=limits) as client:

            async def one() -> None:
                async with gate:
                    try:
                        await self._ask(client)
                    except httpx.TransportError as error:
                        self.broken.append(repr(error))

            await asyncio.gather(*(one() for _ in range(requests)))

    async def _ask(self, client: httpx.AsyncClient) -> None:
        chance = self._chance
        prompt, guards = chance.choice(self.prompts), chance.choice(self.configurations)
        limit, fate = chance.randint(4, STEPS), chance.random()
        if fate < 0.05:
            asking = asyncio.ensure_future(client.post("/v1/chat/completions", json=_body(prompt, guards, max_tokens=limit)))
            await asyncio.sleep(chance.uniform(0, 0.05))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self.disconnected += 1
        elif fate < 0.4:
            leaves = fate < 0.15
            ids = await self._stream(client, _body(prompt, guards, max_tokens=STEPS if leaves else limit, stream=True), leaves)
            if leaves:
                self.cancelled += 1
            self._judge(prompt, guards, ids, len(ids) if leaves else limit)
        else:
            said = await client.post("/v1/chat/completions", json=_body(prompt, guards, max_tokens=limit))
            assert said.status_code == 200, said.text
            self._judge(prompt, guards, said.json()["choices"][0]["token_ids"], limit)

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> list[int]:
        ids: list[int] = []
        async with client.stream("POST", "/v1/chat/completions", json=body) as said:
            assert said.status_code == 200
            async for line in said.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        ids += choice.get("token_ids") or ()
                if leaves and len(ids) >= 2:
                    break
        return ids

    def _judge(self, prompt: str, guards: Guards, ids: Sequence[int], limit: int) -> None:
        known = self.known[prompt, json.dumps(guards)]
        self.finished += 1
        due = known.ids[:limit]
        told = min(known.sure, limit)
        if tuple(ids[:told]) != due[:told] or (known.sure >= len(due) and len(ids) != len(due)):
            self.wrong.append(f"{prompt!r} under {guards}: {list(ids)} where {list(due)} was due")


def _body(prompt: str, guards: Guards, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    steering = {"guards": guards}
    own = {"model": "organism", "messages": messages, "temperature": 0, "max_tokens": STEPS, "return_token_ids": True}
    return {**own, "steering": steering, **more}


def _known(choice: dict[str, Any]) -> Known:
    ids, sure = tuple(choice["token_ids"]), 0
    for token in choice["logprobs"]["content"]:
        first, second = (one["logprob"] for one in token["top_logprobs"][:2])
        if first - second < TIE:
            break
        sure += 1
    return Known(ids, choice["message"]["content"], sure)
