"""queue_batch.py without a server: who gets a job, when one is lost for good, where prompt and seed go, the log."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402

import batch_jobs  # noqa: E402
import queue_batch  # noqa: E402
from diagonal_sampler import disk  # noqa: E402

NAMES = ("http://a", "http://b", "http://c")
FAILED = {"status": {"status_str": "error", "messages": [["execution_error", {"node_type": "N", "node_id": "1"}]]}}
DONE = {"status": {"status_str": "success", "messages": None}}
CUT = {"status": {"status_str": "error", "messages": [["execution_interrupted", {}]]}}


class Bench:
    """A batch whose servers are only names: what happens to its jobs is called by hand."""

    def __init__(self, folder: Path, jobs: int, servers: int = 3) -> None:
        self.jobs = batch_jobs.make_jobs(["p"], list(range(jobs)), "g")
        self.servers = [queue_batch.Server(url, None) for url in NAMES[:servers]]
        for server in self.servers:
            server.reached = True
        self.log = batch_jobs.BatchLog(folder / "batch.jsonl", "g", resume=False)
        options = queue_batch.Options(
            graph={},
            prompt_targets=[],
            seed_targets=[],
            in_flight=2,
            patience=9.0,
            first_patience=9.0,
            stall=9.0,
            output=None,
        )
        display = queue_batch.Display(jobs, list(NAMES))
        self.batch = queue_batch.Batch(self.jobs, self.servers, options, self.log, display)

    def give(self, server: queue_batch.Server) -> batch_jobs.Job:
        """A server takes its next job."""
        job = self.batch._next_for(server)
        assert job is not None
        server.jobs[job.prompt_id] = job
        self.log.start(job, server.url)
        return job

    def end(self, server: queue_batch.Server, job: batch_jobs.Job, entry: dict) -> None:
        """The server's history has a job."""
        asyncio.run(self.batch._finish(server, job, entry))

    def records(self) -> list[tuple[str, int, str | None]]:
        lines = [json.loads(line) for line in self.log.path.read_text().splitlines()]
        return [(line["server"], line["seed"], line["error"]) for line in lines]


# --------------------------------------------------------------------------------------------------- addresses


def test_a_login_goes_to_its_server_alone_and_a_redirect_is_not_followed(tmp_path):
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.path, request.headers.get("Authorization")))
        if request.path in ("/prompt", "/view", "/history/x"):
            return web.Response(status=307, headers={"Location": "/elsewhere"})
        return web.json_response({})

    async def ask() -> None:
        bench = Bench(tmp_path, 1, servers=1)
        bench.batch.options = replace(bench.batch.options, output=tmp_path)
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        url, headers = queue_batch.server_address(f"http://me:secret@127.0.0.1:{port}/")
        async with aiohttp.ClientSession() as session:
            server = queue_batch.Server(url, session, headers)
            assert (await server.request("POST", "/prompt", body={}))[0] == 307
            assert await server.get("/queue") == {}
            with pytest.raises(queue_batch.ConnectionLost, match="HTTP 307, a redirect"):
                await server.finished("x")
            with pytest.raises(queue_batch.DownloadError, match="HTTP 307, a redirect"):
                result = {"filename": "a.mp4", "subfolder": "", "type": "output"}
                await bench.batch._download(server, result, tmp_path / "a.mp4")
            with pytest.raises(queue_batch.ConnectionLost, match="websocket"):
                await bench.batch._websocket(server)
        await runner.cleanup()

    asyncio.run(ask())
    assert [path for path, _ in seen] == ["/prompt", "/queue", "/history/x", "/view", "/ws"]
    assert {login for _, login in seen} == {"Basic bWU6c2VjcmV0"}, "me:secret"
    assert "a redirect" in batch_jobs.refusal(307, None) and "a redirect" in batch_jobs.refusal(307, {})


def test_a_password_is_neither_printed_nor_written(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("p")
    graph = {"1": _encoder(), "3": _node(positive=["1", 0], seed=1)}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    digest = batch_jobs.graph_digest(graph, [batch_jobs.Target("1", "text"), batch_jobs.Target("3", "seed")])
    url, log = "http://me:secret@127.0.0.1:9", tmp_path / "batch.jsonl"
    jobs = [["p", 0, str(uuid.uuid4()), url]]  # as earlier versions wrote it
    Path(f"{log}.inflight").write_text(json.dumps({"graph": digest, "jobs": jobs}))
    flags = [str(tmp_path / "graph.json"), "--prompts", str(tmp_path / "prompts.txt"), "--log", str(log)]
    assert queue_batch.main([*flags, "--server", url, "--patience", "0", "--resume"]) == 1
    assert json.loads(log.read_text())["server"] == "http://127.0.0.1:9"
    printed = capsys.readouterr()
    assert "lost http://127.0.0.1:9" in printed.out and "is looked for on all" not in printed.out
    texts = [printed.out, printed.err, *(path.read_text() for path in tmp_path.glob("batch.jsonl*"))]
    assert len(texts) == 5 and not any("secret" in text for text in texts)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://pod.example/?token=secret", "https://pod.example/..."),
        ("https://pod.example/?token=a@secret", "..."),
        ("http://me:sec?secret@host", "..."),
        ("me:secret@host/?token=secret", "...@host/..."),
        ("http://host:8188#secret", "http://host:8188..."),
    ],
)
def test_an_address_with_a_query_is_refused_and_the_query_not_printed(address, shown):
    with pytest.raises(batch_jobs.BatchError) as refused:
        queue_batch.server_address(address)
    assert str(refused.value).startswith(f"--server {shown!r} is no address;")


# ----------------------------------------------------------------------------------------------- who gets a job


def test_a_job_that_fails_for_its_own_sake_is_tried_once_on_each_server_and_takes_none_out(tmp_path, capsys):
    bench = Bench(tmp_path, 4)
    for _ in range(4):
        ids = set()
        for server in bench.servers:
            job = bench.give(server)
            ids.add(job.prompt_id)
            bench.end(server, job, FAILED)
        assert len(ids) == 3, "another id for each server: two may be one server with two names"
    assert bench.batch.over and bench.batch.failed == 4
    assert [(server, seed) for server, seed, _ in bench.records()] == [("http://c", seed) for seed in range(4)]
    assert all(server.open for server in bench.servers) and not bench.log.inflight
    assert capsys.readouterr().out.count("another server tries it") == 2, "once for a server"


def test_a_server_does_not_get_a_job_again_that_it_failed(tmp_path):
    bench = Bench(tmp_path, 2, servers=2)
    first, second = bench.jobs
    a, b = bench.servers
    bench.end(a, bench.give(a), FAILED)
    assert (bench.give(a), bench.give(b)) == (second, first)


def test_with_one_server_a_failed_job_is_not_tried_again(tmp_path):
    bench = Bench(tmp_path, 1, servers=1)
    (server,) = bench.servers
    bench.end(server, bench.give(server), FAILED)
    assert bench.batch.over and [seed for _, seed, _ in bench.records()] == [0]


def test_a_job_that_a_person_interrupted_goes_to_no_other_server(tmp_path):
    bench = Bench(tmp_path, 1)
    bench.end(bench.servers[0], bench.give(bench.servers[0]), CUT)
    assert bench.records() == [("http://a", 0, batch_jobs.INTERRUPTED)]


def test_a_server_that_fails_what_others_do_is_taken_out_unless_it_does_one_itself(tmp_path, capsys):
    bench = Bench(tmp_path, 9, servers=2)
    bad, good = bench.servers
    for fails in (True, True, False, True, True, True):
        job = bench.give(bad)
        bench.end(bad, job, FAILED if fails else DONE)
        if fails:
            assert bad.open
            bench.end(good, bench.give(good), DONE)
    assert bad.out and not bad.open and good.open and bench.batch.failed == 0
    assert capsys.readouterr().out.count("gets no more jobs") == 1


def test_the_last_server_is_not_taken_out(tmp_path):
    bench = Bench(tmp_path, 4, servers=2)
    bad, good = bench.servers
    jobs = [bench.give(bad) for _ in range(4)]
    for job in jobs:
        bench.end(bad, job, FAILED)
    others = [bench.give(good) for _ in range(4)]
    good.open = False  # given up, and what it has ends well after all
    for job in others:
        bench.end(good, job, DONE)
    assert bad.open and not bad.out


def test_a_job_waits_for_no_server_that_is_given_up(tmp_path):
    bench = Bench(tmp_path, 2)
    a, b, c = bench.servers
    bench.batch._give_up(c, "gone")
    for server in (a, b):
        job = bench.give(server)
        bench.end(server, job, FAILED)
        assert len(bench.batch.waiting) == (2 if server is a else 1)
    assert [error for _, _, error in bench.records()] == ["N (node 1): None: None"]
    bench.end(a, bench.give(a), FAILED)
    assert len(bench.batch.waiting) == 1
    bench.batch._give_up(b, "gone")
    assert bench.batch.unfinished == 0 and bench.records()[-1][0] == "http://a"


def test_a_server_that_can_do_nothing_gets_three_jobs_while_another_is_still_to_come(tmp_path, capsys):
    bench = Bench(tmp_path, 6, servers=2)
    bad, late = bench.servers
    late.reached = False
    for _ in range(queue_batch.MAX_FAULTS):
        bench.end(bad, bench.give(bad), FAILED)
    assert bench.batch._next_for(bad) is None and bench.batch._next_for(late) in bench.jobs[:3]
    bad.settled = 1
    assert bench.batch._next_for(bad) is bench.jobs[3], "it has done one: the jobs may be to blame"
    bad.settled = 0
    bench.batch._give_up(late, "gone")
    assert bench.batch._next_for(bad) is bench.jobs[4], "there is no other to wait for"
    printed = capsys.readouterr().out
    assert printed.count("another server tries it") == printed.count("until another server answers") == 1


# --------------------------------------------------------------------------------------------- a server that is silent


def _silence(bench: Bench, server: queue_batch.Server, minutes: float) -> None:
    """Nothing is heard of a server for so long, and its queue holds its jobs in their order."""
    server.heard -= minutes * 60
    bench.batch._notice_silence(server, list(server.jobs))


def test_a_server_whose_queue_goes_on_is_not_silent_without_a_word(tmp_path):
    bench = Bench(tmp_path, 40, servers=1)
    (server,) = bench.servers
    bench.batch.options = replace(bench.batch.options, stall=3600.0)
    for _ in range(39):
        while len(server.jobs) < 2:
            bench.give(server)
        _silence(bench, server, 25)
        _silence(bench, server, 25)
        bench.end(server, next(iter(server.jobs.values())), DONE)
    assert server.settled == 39


def test_a_silent_server_is_connected_anew_before_it_is_given_up(tmp_path):
    bench = Bench(tmp_path, 2, servers=1)
    (server,) = bench.servers
    bench.batch.options = replace(bench.batch.options, stall=3600.0)
    job = bench.give(server)
    bench.batch._notice_silence(server, [job.prompt_id])
    with pytest.raises(queue_batch.ConnectionLost, match="no word of its job for 31 minutes"):
        _silence(bench, server, 31)
    server.heard += 31 * 60  # connected
    _silence(bench, server, 29)
    with pytest.raises(queue_batch.ServerUnfit, match="no word of its job for 60 minutes, see --stall"):
        _silence(bench, server, 2)
    server.hear()  # the new websocket brings events
    with pytest.raises(queue_batch.ConnectionLost):
        _silence(bench, server, 31)


# ------------------------------------------------------------------------------------------ what a loss counts for


def test_a_lost_server_counts_against_the_jobs_that_it_had_begun(tmp_path):
    bench = Bench(tmp_path, 3, servers=1)
    (server,) = bench.servers
    poison, first, second = (bench.give(server) for _ in range(3))
    for round_ in range(1, 4):
        for job in (poison, first, second):
            job.attempts += 1
        poison.started = True
        left = bench.batch._survivors(server, [first, poison, second])
        assert left == ([first, poison, second] if round_ < 3 else [first, second])
    assert (first.losses, second.losses) == (0, 0)
    assert bench.records()[0][2] == "the server was lost 3 times while it had this job"


def test_a_job_that_ends_its_server_before_a_word_is_not_sent_for_ever(tmp_path):
    bench = Bench(tmp_path, 2, servers=1)
    (server,) = bench.servers
    jobs = [bench.give(server) for _ in range(2)]
    assert bench.batch._survivors(server, jobs) == jobs and not jobs[0].losses, "of an earlier run: not sent yet"
    jobs[0].attempts = jobs[1].attempts = 1
    for _ in range(2):
        assert bench.batch._survivors(server, jobs) == jobs
    assert bench.batch._survivors(server, jobs) == [jobs[1]] and jobs[1].losses == 0


def test_a_server_that_ends_with_every_job_loses_them_to_another_and_is_taken_out(tmp_path, capsys):
    bench = Bench(tmp_path, 6, servers=2)
    bad, good = bench.servers
    for _ in range(queue_batch.MAX_FAULTS):
        job, behind = bench.give(bad), bench.give(bad)
        for _ in range(3):
            job.attempts, job.started = job.attempts + 1, True
            left = bench.batch._survivors(bad, [job, behind])
        assert left == [behind] and list(bench.batch.waiting)[0] is job, "another server gets it"
        bench.end(bad, behind, CUT)
        bench.end(good, bench.give(good), DONE)
    assert bad.out and bench.batch.failed == 3
    printed = capsys.readouterr().out
    assert "others did the last 3 that it could not: the server was lost 3 times while it had this job" in printed


def test_a_job_that_one_server_did_not_survive_is_sent_again_where_it_only_waited(tmp_path):
    bench = Bench(tmp_path, 2, servers=2)
    bad, good = bench.servers
    job = bench.give(bad)
    for _ in range(3):
        job.attempts, job.started = job.attempts + 1, True
        bench.batch._survivors(bad, [job])
    waits, runs = bench.give(good), bench.give(good)
    waits.attempts = runs.attempts = 1
    runs.started = True
    assert waits is job and bench.batch._survivors(good, [waits, runs]) == [waits, runs]


def test_a_job_that_ends_every_server_is_not_sent_for_ever(tmp_path):
    bench = Bench(tmp_path, 1, servers=2)
    sent = 0
    for server in bench.servers:
        job = bench.give(server)
        while job.prompt_id in server.jobs:
            job.attempts, job.started, sent = job.attempts + 1, True, sent + 1
            bench.batch._survivors(server, [job])
    assert bench.batch.over and bench.batch.failed == 1 and sent == 4


def test_a_job_has_started_once_an_event_tells_of_it(tmp_path):
    class Socket:
        def __init__(self, *events: dict) -> None:
            self.events = list(events)

        def __aiter__(self):
            return self

        async def __anext__(self) -> aiohttp.WSMessage:
            if not self.events:
                raise StopAsyncIteration
            return aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, json.dumps(self.events.pop(0)), None)

    bench = Bench(tmp_path, 2, servers=1)
    (server,) = bench.servers
    jobs = [bench.give(server) for _ in range(2)]
    odd = [
        {"type": "progress", "data": {"prompt_id": i, "value": None, "max": [1]}} for i in (["x"], jobs[0].prompt_id)
    ]
    events = [{"type": "execution_start", "data": {"prompt_id": jobs[0].prompt_id}}, {"type": "status", "data": {}}]
    asyncio.run(bench.batch._read_events(server, Socket(*events, *odd, {"data": 3})))
    assert [job.started for job in jobs] == [True, False]


def test_a_failed_job_does_not_renew_the_patience_with_its_server(tmp_path):
    bench = Bench(tmp_path, 2, servers=1)
    (server,) = bench.servers
    bench.batch._fail(server, bench.give(server), "x")
    assert server.settled == 0
    bench.end(server, bench.give(server), DONE)
    assert server.settled == 1


def test_jobs_of_a_dead_server_move_and_those_of_a_lost_one_stay_where_resume_looks(tmp_path):
    bench = Bench(tmp_path, 4)
    a, b, _ = bench.servers
    moved, kept = [bench.give(a) for _ in range(2)], [bench.give(b) for _ in range(2)]
    moved[0].ended = True
    bench.batch._give_up(a, "refused", dead=True)
    assert list(bench.batch.waiting) == moved and not moved[0].ended and not a.jobs
    bench.batch._give_up(b, "silent")
    assert [seed for _, seed, _ in bench.records()] == [2, 3]
    assert bench.log.inflight == {job.key: (job.prompt_id, b.url) for job in kept}


def test_a_finished_job_is_not_taken_back(tmp_path):
    bench = Bench(tmp_path, 2, servers=1)
    (server,) = bench.servers
    cancelled = []

    async def cancel(jobs):
        cancelled.extend(jobs)
        return True

    ended, running = bench.give(server), bench.give(server)
    ended.ended, server.cancel = True, cancel
    asyncio.run(bench.batch._cancel(server))
    assert cancelled == [running] and list(bench.log.inflight) == [ended.key]


# ------------------------------------------------------------------------------------- where prompt and seed go


def _encoder(**inputs):
    return {"class_type": "CLIPTextEncode", "inputs": {"text": "x", "clip": ["9", 0], **inputs}}


def _node(class_type="KSampler", title=None, **inputs):
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


SAMPLER = _node(positive=["1", 0], negative=["2", 0], seed=1)


def test_the_negative_text_never_takes_the_prompt():
    unknown = _node("CLIPTextEncodeFlux", t5xxl="a", clip_l="b")
    for negative in (_encoder(), _node("Note", "Prompt", text="x"), _encoder(text=["4", 0])):
        graph = {"1": unknown, "2": negative, "3": SAMPLER, "4": _node("PrimitiveString", "Prompt", value="x")}
        with pytest.raises(
            batch_jobs.BatchError, match=r"0 places for the prompt; choose with --prompt-node.*1\.t5xxl"
        ):
            batch_jobs.find_prompt_targets(graph, [])
    between = _node("ConditioningZeroOut", conditioning=["6", 0])
    with pytest.raises(batch_jobs.BatchError, match="0 places for the prompt"):
        batch_jobs.find_prompt_targets({"1": unknown, "2": between, "3": SAMPLER, "6": _encoder()}, [])
    with pytest.raises(batch_jobs.BatchError, match="0 places for the prompt"):  # of no side at all
        batch_jobs.find_prompt_targets({"1": unknown, "2": unknown, "3": SAMPLER, "6": _encoder()}, [])
    guider = _node("DualCFGGuider", cond1=["1", 0], negative=["2", 0])
    with pytest.raises(batch_jobs.BatchError, match="0 places for the prompt"):
        batch_jobs.find_prompt_targets({"1": unknown, "2": _encoder(), "3": guider}, [])
    unknown = _node("CLIPTextEncodeFlux", t5xxl=["4", 0], clip_l=["4", 0])
    graph = {"1": unknown, "2": _encoder(), "3": SAMPLER, "4": _node("AnyText", "Prompt", value="x")}
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("4", "value")]


def test_a_text_is_followed_through_the_nodes_it_comes_from():
    for name in ("value", "text", "string", "prompt"):
        graph = {"1": _encoder(text=["4", 0]), "2": _encoder(), "3": SAMPLER, "4": _node("Text", **{name: "x"})}
        assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("4", name)]
        graph["4"], graph["5"] = _node("Reroute", value=["5", 0]), graph["4"]
        assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("5", name)]
    graph["5"] = _node("Loop", value=["4", 0])
    with pytest.raises(batch_jobs.BatchError, match="0 places"):
        batch_jobs.find_prompt_targets(graph, [])
    long = {str(n): _node("Reroute", value=[str(n + 1), 0]) for n in range(10, 5000)}
    long |= {"5000": _node("Text", value="x"), "1": _encoder(text=["10", 0]), "3": SAMPLER}
    assert batch_jobs.find_prompt_targets(long, []) == [batch_jobs.Target("5000", "value")]


def test_a_schedule_that_goes_on_from_another_takes_no_prompt_without_a_time():
    """Its server would refuse each job: the first of its rows begins where another one does."""
    later = _node("DiagonalPromptSchedule", text="5s: b", previous=["4", 0])
    graph = {"1": later, "2": _encoder(), "3": SAMPLER, "4": _node("DiagonalPromptSchedule", text="0: a")}
    known = r"node 1 \(DiagonalPromptSchedule\).*--prompt-node ID.*Candidates: 1\.text .*4\.text "
    for node in (later, _node("DiagonalPromptSchedule", text=["5", 0], previous=["4", 0])):
        with pytest.raises(batch_jobs.BatchError, match="goes on from its previous"):
            batch_jobs.find_prompt_targets(graph | {"1": node, "5": _node("Text", value="5s: b")}, [])
    with pytest.raises(batch_jobs.BatchError, match=known):
        batch_jobs.find_prompt_targets(graph, [])
    titled = _node("DiagonalPromptSchedule", "Prompt", text="5s: b", previous=["4", 0])
    with pytest.raises(batch_jobs.BatchError, match="goes on from its previous"):
        batch_jobs.find_prompt_targets({"1": titled, "4": _encoder()}, [])
    for node_id in ("1", "4"):
        assert batch_jobs.find_prompt_targets(graph, [node_id]) == [batch_jobs.Target(node_id, "text")]
    graph["1"] = _node("DiagonalPromptSchedule", text="0: a", previous=["8", 0])  # which is not there
    assert batch_jobs.find_prompt_targets(graph, []) == [batch_jobs.Target("1", "text")]


def test_a_seed_behind_a_link_that_is_not_understood_is_a_place_too():
    graph = {"1": _node(seed=3), "2": _node(seed=["4", 0]), "4": _node("Random", low=1)}
    with pytest.raises(batch_jobs.BatchError, match=r"2 places for the seed; choose with --seed-node.*1\.seed.*4\.low"):
        batch_jobs.find_seed_targets(graph, [])
    assert batch_jobs.find_seed_targets(graph, ["1"]) == [batch_jobs.Target("1", "seed")]
    graph["4"] = _node("PrimitiveBoolean", value=True)
    with pytest.raises(batch_jobs.BatchError, match="2 places for the seed"):
        batch_jobs.find_seed_targets(graph, [])
    graph["4"] = _node("Seed (rgthree)", seed=["5", 0])
    graph["5"] = _node("PrimitiveInt", value=5)
    assert batch_jobs.find_seed_targets({"2": graph["2"], "4": graph["4"], "5": graph["5"]}, []) == [
        batch_jobs.Target("5", "value")
    ]


# --------------------------------------------------------------------------------------------------- shot lists


SHOT_GRAPH = {
    "1": _node("CLIPTextEncode", "Positive", text="a dog", clip=["9", 0]),
    "2": _node("CLIPTextEncode", "Negative (v1.5)", text="bad"),
    "3": _node(positive=["1", 0], negative=["2", 0], seed=5, cfg=1, denoise=0.5, tiled=False),
    "4": _node("LoadImage", "Start", image="example.png"),
    "5": _node("SaveVideo", "Start 2", filename_prefix="v", **{"codec.encoding": "auto"}),
    "6": _node("Note", "Twin", text="x"),
    "7": _node("Note", "Twin", text="x"),
}
PROMPT_PLACE, SEED_PLACE = [batch_jobs.Target("1", "text")], [batch_jobs.Target("3", "seed")]


def _shots(folder: Path, text: str | bytes, name: str = "shots.csv") -> list[batch_jobs.Row]:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return batch_jobs.read_shots(folder / name, SHOT_GRAPH, PROMPT_PLACE, SEED_PLACE)


def test_tables_of_every_kind_say_the_same(tmp_path):
    header = ["Prompt", " seed", "name", "negative (V1.5).text", "3.tiled", "5.codec.encoding"]
    cells = ["a cat, black;\nthen white", "7", "first", 'say "no"', "Yes", "slow"]

    def table(delimiter: str, end: str) -> str:
        quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
        return end.join((delimiter.join(header), delimiter.join(quoted), delimiter * 5, delimiter.join(["", "8"]), ""))

    line = json.dumps({"prompt": cells[0], "seed": 7, "name": "first", "2.text": cells[3], "3.tiled": True})
    line = line[:-1] + ', "5.codec.encoding": "slow"}\r\n\n{"seed": 8, "2.text": null}'
    files = [("a.csv", table(",", "\n")), ("b.CSV", "\ufeff" + table(";", "\r\n")), ("c.csv", table("\t", "\r"))]
    for name, text in [*files, ("d.tsv", table("\t", "\n")), ("e.jsonl", line), ("f.ndjson", line)]:
        assert batch_jobs.is_shot_list(tmp_path / name)
        first, second = _shots(tmp_path, text, name)
        assert (first.prompt, first.seed, first.name) == (cells[0], 7, "first")
        assert first.values_by_name == {"2.text": 'say "no"', "3.tiled": True, "5.codec.encoding": "slow"}
        assert (second.prompt, second.seed, second.name, second.values) == ("a dog", 8, "", {}), name
    assert not batch_jobs.is_shot_list(tmp_path / "a.txt")


def test_a_cell_becomes_what_it_replaces(tmp_path):
    table = "3.cfg,3.denoise,3.tiled,2.text\n2,1,false,5\n2.0,.25,1,TRUE\n1.5,1e-1,ON,1.0\n"
    rows = [list(row.values.values()) for row in _shots(tmp_path, table)]
    assert rows == [[2, 1.0, False, "5"], [2, 0.25, True, "TRUE"], [1.5, 0.1, True, "1.0"]]
    assert [[type(value) for value in row] for row in rows[:2]] == [[int, float, bool, str]] * 2
    lines = '{"3.cfg": 2, "3.denoise": 1, "3.tiled": false, "2.text": ""}\n{"3.cfg": "2.0", "3.denoise": "1"}'
    rows = [list(row.values.values()) for row in _shots(tmp_path, lines, "a.jsonl")]
    assert rows == [[2, 1.0, False, ""], [2, 1.0]]
    decimals = [row.decimals(SHOT_GRAPH) for row in _shots(tmp_path, "3.cfg,3.denoise\n1.5,1\n2,0.5\n")]
    assert decimals == [[batch_jobs.Target("3", "cfg")], []]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,3.cfg\na,1\nb,much\n", r"a\.csv row 3, column 3\.cfg: 'much' is no number; write it like 81"),
        ("a.csv", "prompt;3.denoise\na;0,5\n", r"row 2, column 3\.denoise: '0,5' is no number; write it like 0\.5"),
        ("a.csv", "3.denoise\n1e999\n", "'1e999' is too large"),
        ("a.csv", "3.denoise\n1_0\n", "'1_0' is no number"),
        ("a.csv", "3.tiled\nmaybe\n", "row 2, column 3.tiled: 'maybe' is neither true nor false"),
        ("a.csv", "prompt,seed\na,1.5\n", "row 2, column seed: '1.5' is no seed"),
        ("a.csv", "prompt,seed\na,-1\n", "'-1' is no seed"),
        ("a.csv", f"prompt,seed\na,{2**64}\n", "is no seed"),
        ("a.csv", "prompt,3.steps\na,1\n", r"the column '3\.steps': 'steps' is no widget there; it has: seed, cfg"),
        ("a.csv", "prompt,3.positive\na,1\n", "'positive' is a link there"),
        ("a.csv", "prompt,notes\na,1\n", "'notes' names no node"),
        ("a.csv", "prompt,Twin.text\na,1\n", r"names 2 nodes \(ids 6, 7\)"),
        ("a.csv", "prompt,1.text\na,1\n", "the column '1.text' is the prompt; call it prompt"),
        ("a.csv", "prompt,3.seed\na,1\n", "the column '3.seed' is the seed; call it seed"),
        ("a.csv", "4.image,Start.image\na,1\n", "'Start.image' sets what another column sets"),
        ("a.csv", "prompt,Prompt\na,1\n", "has the column 'Prompt' twice"),
        ("a.csv", "prompt,,seed\na,1,1\n", "column 2 has no name"),
        ("a.csv", "\nprompt\na\n", "row 1 has no name"),
        (
            "a.csv",
            "prompt,seed\na cat, black,1\n",
            "row 2 has 3 cells and the header 2; a text with ',' in it needs quotes",
        ),
        ("a.csv", 'prompt\n"a\n', "is no table, behind row 1"),
        ("a.csv", "prompt\n\n", "holds no row"),
        ("a.csv", "prompt\na\0\n", "holds a zero byte"),
        ("a.csv", b"prompt\n\xff\n", "is not UTF-8 text: byte 0xff in line 2"),
        ("a.jsonl", '{"prompt": "a"}\n["a"]', "row 2 is no JSON object"),
        ("a.jsonl", "\n", "holds no line"),
        ("a.jsonl", '{"prompt": 5}', "row 1, column prompt: '5' is no text; write it in quotes"),
        ("a.jsonl", '{"2.text": "\\ud800"}', "half a character"),
        ("a.jsonl", '{"2.text": "\\u0000"}', "a zero byte"),
        ("a.jsonl", '{"3.cfg": true}', "'true' is no number"),
        ("a.jsonl", '{"3.cfg": NaN}', "'NaN' is no number"),
        ("a.jsonl", '{"3.tiled": 1}', "'1' is neither true nor false"),
        ("a.jsonl", '{"3.cfg": [1]}', "is no number"),
        ("a.jsonl", '{"": 1}', "column 1 has no name"),
    ],
)
def test_a_shot_list_that_says_something_else_is_refused(tmp_path, name, text, message):
    with pytest.raises(batch_jobs.BatchError, match=f"--prompts: .*{message}"):
        _shots(tmp_path, text, name)


def test_the_kept_prompt_of_several_places_is_one(tmp_path):
    (tmp_path / "a.csv").write_text("seed\n1\n")
    places = [*PROMPT_PLACE, batch_jobs.Target("6", "text")]
    with pytest.raises(batch_jobs.BatchError, match="row 2 has no prompt, and the graph has several"):
        batch_jobs.read_shots(tmp_path / "a.csv", SHOT_GRAPH, places, SEED_PLACE)


def test_rows_are_jobs_that_repeats_leave_one_of_and_without_values_they_are_those_of_before(tmp_path):
    rows = _shots(tmp_path, "prompt,seed,name,3.cfg\na,1\na,1,other\na,1,third,2\na,1,,2\na,1,,3\n")
    first, second, third = jobs = batch_jobs.make_row_jobs(rows, [0], "g")
    (before,) = batch_jobs.make_jobs(["a"], [1], "g")
    assert (first.key, first.name) == (before.key, before.name) == (("a", 1), "0001_s1_a_1d96e8f6")
    assert [job.values for job in jobs] == [{}, {"3.cfg": 2}, {"3.cfg": 3}] and len({job.key for job in jobs}) == 3
    assert second.name.startswith("0002_s1_third_") and third.name[:-8] == "0003_s1_a_"
    assert second.name[-8:] != third.name[-8:] != first.name[-8:]
    graph = batch_jobs.graph_for(SHOT_GRAPH, second, PROMPT_PLACE, SEED_PLACE)
    assert graph["3"]["inputs"] == {**SHOT_GRAPH["3"]["inputs"], "seed": 1, "cfg": 2}
    assert SHOT_GRAPH["3"]["inputs"]["cfg"] == 1
    rows = _shots(tmp_path, "prompt,3.cfg\na,1\nb,1\n")
    jobs = batch_jobs.make_row_jobs(rows, [4, 5], "g")
    assert [(job.prompt, job.seed) for job in jobs] == [("a", 4), ("a", 5), ("b", 4), ("b", 5)]


def test_the_log_tells_rows_apart_by_their_values(tmp_path):
    jobs = batch_jobs.make_row_jobs(_shots(tmp_path, "prompt,3.cfg,2.text\na,,\na,2,\u00e9\na,3,\n"), [1], "g")
    log = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=False)
    for job in jobs[:2]:
        values = {"values": dict(reversed(job.values.items()))} if job.values else {}
        log.append({"prompt": "a", "seed": 1, "status": "done", "graph": "g", **values})
    log.start(jobs[2], "http://a")
    log.close()
    log = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=True)
    assert log.done == {jobs[0].key, jobs[1].key} and jobs[0].key == ("a", 1)
    assert log.inflight == {jobs[2].key: (jobs[2].prompt_id, "http://a")}
    log.close()


def test_a_cell_names_a_file_beside_the_list_and_the_server_hears_a_plain_name(tmp_path):
    folder = tmp_path / "list"
    folder.mkdir()
    picture = tmp_path / "\u00c9t\u00e9 $(x) ..PNG"
    picture.write_bytes(b"one")
    (folder / "note").write_bytes(b"one")
    (folder / "folder.png").mkdir()
    cells = [f"../{picture.name}", str(picture), "note", "folder.png", "away.png", "x" * 5000 + ".png"]
    rows = _shots(folder, "4.image\n" + "\n".join(f'"{cell}"' for cell in cells) + "\n")
    values = [row.values[batch_jobs.Target("4", "image")] for row in rows]
    assert values[0] == values[1] == f"ete-x_{hashlib.sha256(b'one').hexdigest()[:16]}.png"
    assert values[2:] == cells[2:] and [len(row.files) for row in rows] == [1, 1, 0, 0, 0, 0]
    picture.write_bytes(b"two")
    assert _shots(folder, f"4.image\n{picture}\n")[0].values_by_name["4.image"] != values[0]


def test_a_list_with_seeds_takes_no_other_seeds(tmp_path, capsys):
    (tmp_path / "graph.json").write_text(json.dumps(SHOT_GRAPH))
    (tmp_path / "a.csv").write_text("prompt,seed\na,1\nb,\n")
    command = [str(tmp_path / "graph.json"), "--prompts", str(tmp_path / "a.csv"), "--seeds", "0"]
    assert queue_batch.main([*command, "--log", str(tmp_path / "log")]) == 2
    assert "has a column for the seed; leave one of the two out" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_what_a_server_says_of_a_widget():
    old = {"N": {"input": {"required": {"a": [["x.png"], {"image_upload": True}]}, "optional": {"b": ["INT", {}]}}}}
    assert batch_jobs.widget_spec(old, "N", "a") == (["x.png"], {"image_upload": True})
    assert batch_jobs.widget_spec(old, "N", "b") == ("INT", {})
    for info in ({}, {"N": None}, {"N": {}}, {"N": {"input": {"required": {"c": []}}}}):
        assert batch_jobs.widget_spec(info, "N", "c") == (None, {})
    assert batch_jobs.takes_uploads({"video_upload": True}) and not batch_jobs.takes_uploads({"image_upload": False})
    assert batch_jobs.takes_uploads({"image_upload": True, "image_folder": "input"})
    assert not batch_jobs.takes_uploads({"image_upload": True, "image_folder": "output"})


def test_a_file_that_changed_or_that_a_server_refuses_fails_its_row_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    (row,) = _shots(tmp_path, "4.image\na.png\n")
    (file,) = row.files.values()
    bench = Bench(tmp_path, 1, servers=1)
    (server,) = bench.servers
    answers = [(413, None), (200, {"name": "other.png"}), (200, {"name": file.name})]

    async def request(method, path, **content):
        sent.append((method, path, content["form"]))
        return answers[len(sent) - 1]

    sent, server.request = [], request
    for _ in range(2):
        with pytest.raises(queue_batch.UploadError, match="the server did not take .*a.png: HTTP"):
            asyncio.run(server.upload(file))
    for _ in range(2):
        asyncio.run(server.upload(file))
    assert len(sent) == 3, "sent once"
    server.uploaded.clear()
    (tmp_path / "a.png").write_bytes(b"two")
    bench.batch.options = replace(bench.batch.options, graph=SHOT_GRAPH)
    server.info = {"LoadImage": {"input": {"required": {"image": [[], {"image_upload": True}]}}}}
    job = bench.give(server)
    job.row = row
    asyncio.run(bench.batch._post(server, job))
    ((_, _, error),) = bench.records()
    assert "a.png has changed since the batch began" in error and len(sent) == 3 and not server.jobs


# ------------------------------------------------------------------------------------------------------ the log


def test_a_log_that_another_program_uses_is_refused(tmp_path):
    first = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=True)
    for resume in (True, False):
        with pytest.raises(batch_jobs.BatchError, match="another queue_batch.py is using this log"):
            batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=resume)
    batch_jobs.BatchLog(tmp_path / "other.jsonl", "g", resume=True).close()
    first.append({"prompt": "a"})
    first.close()
    for _ in range(2):  # one that is refused for another reason leaves no lock
        with pytest.raises(batch_jobs.BatchError, match="add --resume") as refused:
            batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=False)
    assert refused
    batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=True).close()


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_line_of_which_the_disk_took_a_part_is_cut_off(tmp_path):
    import resource

    log = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=False)
    log.append({"prompt": "a"})
    before = log.path.read_bytes()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(batch_jobs.BatchError, match="cannot write the log .*batch.jsonl: the disk took a part"):
            log.append({"prompt": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before
    log.append({"prompt": "b"})
    log.close()
    assert len(log.path.read_bytes().splitlines()) == 2


def test_a_file_that_another_program_has_open_for_a_moment_does_not_end_the_batch(tmp_path, monkeypatch):
    log = batch_jobs.BatchLog(tmp_path / "batch.jsonl", "g", resume=False)
    (job,) = batch_jobs.make_jobs(["p"], [1], "g")
    replace, unlink, refusals = os.replace, Path.unlink, []

    def busy(action):
        def act(*arguments, **options):
            refusals.append(action)
            if len(refusals) % 3:  # twice not, then well
                raise PermissionError(13, "used by another process")
            return action(*arguments, **options)

        return act

    monkeypatch.setattr(os, "replace", busy(replace))
    monkeypatch.setattr(Path, "unlink", busy(unlink))
    log.start(job, "http://a")
    assert log.inflight_path.exists()
    log.forget(job)
    assert not log.inflight_path.exists() and len(refusals) == 6
    monkeypatch.setattr(disk, "BUSY_SECONDS", 0.0)
    with pytest.raises(batch_jobs.BatchError, match="inflight: used by another process"):
        log.start(job, "http://a")
    log.close()
