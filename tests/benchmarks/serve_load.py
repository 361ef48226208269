"""How the server holds a load: many clients at once, against the bare model in the same run.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/serve_load.py runs/demo/adapter --seconds 60

Starts `predict --serve` as a process, and uploads the digits of the demo from `--clients` connections that each send
their next image when the last one is answered. The bare model, on pixels prepared beforehand and in batches of the
size that the server uses, runs alone before and after; the ratio is to the mean of both. Clients, server and model
share the cores of one machine. CPU times per image are those of the whole server, of the clients, and of the bare
model; other work on the machine changes them least. Adds a row to `results/serve_load.csv`.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import torch
from result_files import add_rows

from lora_dist import demo
from lora_dist.deployment.classify import choose_batch_size
from lora_dist.model.trained.classifier import Classifier, load_classifier
from lora_dist.processes.cores import available_cores

BOUNDARY = "boundary-of-the-parts"
CPU = torch.device("cpu")


class Load(NamedTuple):
    """What the clients saw: requests per second, errors, seconds of each request, and CPU seconds of the server."""

    rate: float
    errors: int
    seconds: list[float]
    cpu: float = 0.0


def bare_rate(classifier: Classifier, files: list[Path], seconds: float) -> tuple[float, float]:
    """Images per second, and CPU seconds per image, of the model alone."""
    transforms = classifier.transforms()
    size = choose_batch_size(None, CPU, transforms)
    batches = transforms.batch([transforms.load(str(file)) for file in files[: 16 * size]]).split(size)
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    with torch.inference_mode():
        while (spent := time.perf_counter() - start) < seconds:
            batch = batches[done // size % len(batches)]
            classifier.probabilities(batch)
            done += len(batch)
    return done / spent, (time.process_time() - cpu) / done


def request_with(file: Path) -> bytes:
    """An HTTP request that uploads a file."""
    body = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'.encode()
        + file.read_bytes()
        + f"\r\n--{BOUNDARY}--\r\n".encode()
    )
    head = (
        f"POST /predict?top_k=1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    return head.encode() + body


async def client(url: str, requests: list[bytes], first: int, end: float, load: Load) -> int:
    """Sends one request after the other over one connection until `end`; returns the number of errors."""
    address, errors = urlsplit(url), 0
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    while (start := time.perf_counter()) < end:
        writer.write(requests[first % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head.lower())
        assert size, head
        await reader.readexactly(int(size[1]))
        load.seconds.append(time.perf_counter() - start)
        errors += b" 200 " not in head.partition(b"\r\n")[0]
        first += 1
    writer.close()
    return errors


async def all_clients(url: str, files: list[Path], clients: int, seconds: float) -> Load:
    """Runs the clients at the same time."""
    requests, found = [request_with(file) for file in files], Load(0, 0, [])
    start = time.perf_counter()
    running = (client(url, requests, number, start + seconds, found) for number in range(clients))
    errors = sum(await asyncio.gather(*running))
    return Load(len(found.seconds) / (time.perf_counter() - start), errors, found.seconds)


def served(adapter: str, files: list[Path], clients: int, seconds: float) -> Load:
    """Starts a server, lets the clients warm it up, and measures."""
    words = [sys.executable, "-m", "lora_dist.predict", "--adapter", adapter, "--serve", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            url = next(found[1] for line in process.stderr if (found := re.search(r"serving on (http://\S+)", line)))
            asyncio.run(all_clients(url, files, clients, 2))
            before = _cpu_seconds(process.pid)
            load = asyncio.run(all_clients(url, files, clients, seconds))
            return load._replace(cpu=_cpu_seconds(process.pid) - before)
        finally:
            process.terminate()


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    """Measures and prints one row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    files = sorted(Path(demo.local_path("demo:digits/validation")).glob("*/*"))
    classifier = load_classifier(Path(arguments.adapter))
    alone = max(2.0, arguments.seconds / 6)
    before, cpu_before = bare_rate(classifier, files, alone)
    own = time.process_time()
    load = served(arguments.adapter, files, arguments.clients, arguments.seconds)
    own = time.process_time() - own
    after, cpu_after = bare_rate(classifier, files, alone)
    bare = (before + after) / 2
    cuts = quantiles(load.seconds, n=100)
    row: dict[str, object] = {
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "requests": len(load.seconds),
        "errors": load.errors,
        "p50_ms": round(1000 * cuts[49], 1),
        "p95_ms": round(1000 * cuts[94], 1),
        "images_per_second": round(load.rate),
        "bare_images_per_second": round(bare),
        "ratio": round(load.rate / bare, 2),
        "server_cpu_ms": round(1000 * load.cpu / len(load.seconds), 2),
        "clients_cpu_ms": round(1000 * own / len(load.seconds), 2),
        "bare_cpu_ms": round(500 * (cpu_before + cpu_after), 2),
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    add_rows("serve_load.csv", [row])


if __name__ == "__main__":
    main()
