"""Serving: tokens per second and time to the first token, beside `transformers serve`.

    python -m benchmarks.serve [--model FOLDER] [--clients 1 8 32] --json FILE

Clients in another process stream greedy continuations of different prompts of 40 to 250 tokens, 32 tokens each.
Each client waits for its answer before it asks again. All contenders compute in bf16 with all cores, which they
share with the clients; the clients' own CPU time is in the table.

    forge engine          clients call the engine in its own process, without HTTP and Ray
    forge serve           as a user runs it
    transformers serve    one request after another
    the same with --continuous-batching
    vllm serve            from the environment that forge serve --engine vllm has made, if it was made
    forge serve --engine vllm

Ratios are relative to the best variant of the peers, of each figure and number of clients.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tokenizers import Tokenizer
from uvicorn.loops.auto import auto_loop_factory

from benchmarks.finetune_inputs import save_base
from benchmarks.program import FORGE, Program, module, running
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from benchmarks.serve_load import LoadResult, build_prompts, completions, measure_load, read_events
from forge.runtime.vllm_environment import find_vllm
from forge.serve.vllm.process import VLLM_MODULE

MAX_TOKENS = 32
START_S = 900
"""vLLM compiles a model at its first start: 46 s alone on 2 cores, more than 5 minutes beside other work."""
MODEL = Path(__file__).parents[1] / ".fixtures" / "smollm2"
SERVERS = ("forge serve", "transformers serve", "transformers serve --continuous-batching")
ENGINE = "forge engine"
VLLM, OVER_VLLM = "vllm serve", "forge serve --engine vllm"
_WARM_UP_SEED = 1000
_WARM_UP_CLIENTS = 8

Figures = dict[str, dict[int, list[LoadResult]]]
"""Contender → number of clients → repeats."""


def main() -> None:
    """Measure every contender `--repeats` times, in turn."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a transformers model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, help="of torch; by default one for each core")
    parser.add_argument("--only", nargs="+", choices=(ENGINE, *SERVERS, VLLM, OVER_VLLM), default=contenders())
    options = parse_options(parser, smallest={"clients": [2], "model": None})
    found: Figures = {name: {number: [] for number in options.clients} for name in options.only}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        model = options.model
        if model is None:
            model = Path(name) / "tiny"
            save_base(model, kind="sft")
        for repeat, contender in itertools.product(range(options.repeats), options.only):
            folder = Path(name) / f"{options.only.index(contender)}-{repeat}"
            folder.mkdir()
            start = Start(contender=contender, model=model, folder=folder, threads=options.threads)
            results = measure(start, clients=options.clients, seed=repeat)
            for number, result in zip(options.clients, results, strict=True):
                found[contender][number].append(result)
                print(f"  {contender}, {number} clients: {result.text()}", file=sys.stderr)
    figures = figures_of(found, clients=options.clients)
    report(found, clients=options.clients, figures=figures)
    write_json(options.json, figures=figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What is started, and how."""

    contender: str
    model: Path
    folder: Path
    threads: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server."""

    url: str
    program: Program


def measure(start: Start, *, clients: Sequence[int], seed: int) -> list[LoadResult]:
    """Start a contender and let each number of clients use it, after a warm-up. Returns: what they measured."""
    loads = [(_WARM_UP_CLIENTS, _WARM_UP_SEED, _WARM_UP_CLIENTS)]
    loads += [(number, seed * 100 + number, max(16, min(8 * number, 128))) for number in clients]
    if start.contender == ENGINE:
        request = {"model": str(start.model), "dtype": "bf16", "max_tokens": MAX_TOKENS, "loads": loads}
        as_in_replica = ["env", "GOMP_SPINCOUNT=2000", "MKL_CBWR=AUTO"]
        command = [*as_in_replica, *module("bare_engine", request)]
        with running(command, folder=start.folder, threads=start.threads) as program:
            if program.process.wait():
                raise RuntimeError(program.last_words())
        lines = [json.loads(line) for line in (start.folder / "answer").read_text().splitlines()]
        results = [LoadResult(**line) for line in lines]
    else:
        tokenizer = Tokenizer.from_file(str(start.model / "tokenizer.json"))
        with serving(start) as server, asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            results = runner.run(use_server(server, name=str(start.model), loads=loads, tokenizer=tokenizer))
    return results[1:]


async def use_server(
    server: Server, *, name: str, loads: Sequence[tuple[int, int, int]], tokenizer: Tokenizer
) -> list[LoadResult]:
    """Measure loads: number of clients, seed and number of prompts."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        ask = completions(session, server.url, model=name, max_tokens=MAX_TOKENS)
        return [
            await measure_load(
                ask,
                build_prompts(prompts, seed=seed),
                num_clients=number,
                read=read_events,
                count=lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
                cpu_s=server.program.cpu_s,
            )
            for number, seed, prompts in loads
        ]


@contextmanager
def serving(start: Start) -> Iterator[Server]:
    """Run a server. Yields: it, when it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    if start.contender in ("forge serve", OVER_VLLM):
        command = [FORGE, "serve", str(start.model), "--model-name", str(start.model), "--port", str(port)]
        command += ["--engine", "vllm" if start.contender == OVER_VLLM else "forge"]
    elif start.contender == VLLM:
        command = vllm_command(start.model, port=port)
    else:
        command = [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            str(start.model),
            "--port",
            str(port),
        ]
        command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16", *start.contender.split()[2:]]
    if start.contender == OVER_VLLM and (install := find_vllm(is_cuda=False)) is not None:
        (start.folder / "cache").mkdir()
        (start.folder / "cache" / "vllm").symlink_to(install.python.parents[2])
    with running(command, folder=start.folder, threads=start.threads) as program:
        wait_for(program, port=port)
        yield Server(url=f"http://127.0.0.1:{port}", program=program)


def contenders() -> tuple[str, ...]:
    """All that can be measured here: vLLM only where forge has made its environment."""
    vllm = () if find_vllm(is_cuda=False) is None else (VLLM, OVER_VLLM)
    return (ENGINE, *SERVERS, *vllm)


def vllm_command(model: Path, *, port: int) -> list[str]:
    """vLLM's own server, with as large a cache as forge gives it. Raises: RuntimeError if it is not installed."""
    install = find_vllm(is_cuda=False)
    if install is None:
        raise RuntimeError("vLLM is not installed; forge serve FOLDER --engine vllm installs it")
    command = ["env", "HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "VLLM_CPU_OMP_THREADS_BIND=nobind"]
    command += [
        str(install.python),
        "-I",
        "-m",
        VLLM_MODULE,
        "--model",
        str(model),
        "--served-model-name",
        str(model),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    return [*command, "--kv-cache-memory-bytes", str(2 * 2**30)]


def wait_for(program: Program, *, port: int) -> None:
    """Wait until a server answers on a port. Raises: RuntimeError if it ends, or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and program.process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                if b" 200 " in connection.recv(100):
                    return
        except OSError:
            pass
        time.sleep(0.3)
    logs = sorted(program.folder.glob("state/servers/*/logs/*.log"))
    ends = [f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs]
    raise RuntimeError("\n".join(["the server does not answer:", program.last_words(), *ends]))


def figures_of(found: Figures, *, clients: Sequence[int]) -> dict[str, Any]:
    """Medians of each contender, ratios to the best peer, and the cost of HTTP and Ray."""
    figures: dict[str, Any] = {"all": {}}
    for number in clients:
        speed = {name: statistics.median(one.tokens_per_s for one in runs[number]) for name, runs in found.items()}
        first = {
            name: statistics.median(quantile(one, 0.99) for one in runs[number]) for name, runs in found.items()
        }
        work = {
            name: statistics.median(one.tokens_per_cpu_s for one in runs[number]) for name, runs in found.items()
        }
        figures["all"][number] = {"tokens_per_s": speed, "tokens_per_cpu_s": work, "p99_first_s": first}
        peers = [name for name in (*SERVERS[1:], VLLM) if name in speed]
        own = "forge serve" if "forge serve" in speed else ENGINE
        if peers and own in speed:
            figures[f"ratio_tokens_per_s_{number}"] = speed[own] / max(speed[name] for name in peers)
            figures[f"ratio_tokens_per_cpu_s_{number}"] = work[own] / max(work[name] for name in peers)
            figures[f"ratio_p99_first_s_{number}"] = first[own] / min(first[name] for name in peers)
        if {ENGINE, "forge serve"} <= speed.keys():
            figures[f"overhead_{number}"] = 1 - speed["forge serve"] / speed[ENGINE]
            figures[f"overhead_of_cpu_{number}"] = 1 - work["forge serve"] / work[ENGINE]
    return figures


def quantile(result: LoadResult, share: float) -> float:
    """The smallest time that at least `share` of the answers did not exceed."""
    ordered = sorted(result.first_s)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(found: Figures, *, clients: Sequence[int], figures: dict[str, Any]) -> None:
    """Print a table for each number of clients, and the ratios."""
    for number in clients:
        rows = []
        for name, runs in found.items():
            cells = [Measured(values=tuple(one.tokens_per_s for one in runs[number])).text(".1f")]
            cells.append(Measured(values=tuple(one.tokens_per_cpu_s for one in runs[number])).text(".1f"))
            cells.append(Measured(values=tuple(one.client_ms_per_token for one in runs[number])).text(".2f"))
            cells += [
                Measured(values=tuple(quantile(one, share) for one in runs[number])).text(".2f")
                for share in (0.5, 0.99)
            ]
            rows.append([name, *cells])
        header = ["contender", "tokens/s", "per CPU second", "clients, CPU ms/token"]
        header += ["first token, median s", "99 %, s"]
        print_table(f"{number} clients", header=header, rows=rows)
    for name, value in figures.items():
        if name != "all":
            print(f"{name} {value:.3f}")


if __name__ == "__main__":
    main()
