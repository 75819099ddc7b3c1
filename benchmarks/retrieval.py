"""Exact numpy search against the hnswlib graph, on clustered keys: where does the graph pay?

    OPENBLAS_NUM_THREADS=1 python benchmarks/retrieval.py [--json FILE]

Real keys lie in clusters (views of one thing, kinds of one object); on uniformly random keys a
graph finds little and the comparison means nothing. Every key is its cluster's centre plus noise,
20 keys a cluster; the queries are other members of the clusters. Times are for one query on one
thread, searching only: not the reading of the hits from the bank file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from tinyalign.bank import index
from tinyalign.bank.memory import Floats
from tinyalign.bank.store import Generation

WIDTH = 256
CLUSTER = 20
NOISE = 0.5  # length of the noise beside a centre of length 1


def clustered(count: int, queries: int, seed: int) -> tuple[Floats, Floats]:
    """Keys [count, WIDTH] and queries [queries, WIDTH], all of length 1, of the same clusters."""
    random = np.random.default_rng(seed)
    centres = _unit(random.standard_normal((max(count // CLUSTER, 1), WIDTH), np.float32))
    total = count + queries
    noise = NOISE * _unit(random.standard_normal((total, WIDTH), np.float32))
    points = _unit(centres[random.integers(len(centres), size=total)] + noise)
    return points[:count], points[count:]


def measure(count: int, queries: int, k: int, seed: int) -> dict[str, float]:
    """Milliseconds a query (median and 95th percentile), recall and build seconds for one size."""
    keys, questions = clustered(count, queries, seed)
    ids = np.arange(1, count + 1)
    generation = Generation(1, "benchmark")
    exact = index.Snapshot(generation, None, ids, keys)
    start = time.perf_counter()
    built = index.build_graph(ids, keys)
    build_seconds = time.perf_counter() - start
    graph = index.Snapshot(generation, built, ids[:0], keys[:0])
    exact_ms, exact_found = _timed(exact, questions, k)
    graph_ms, graph_found = _timed(graph, questions, k)
    same = [len(a & b) / k for a, b in zip(exact_found, graph_found, strict=True)]
    return {
        "memories": count,
        "exact_ms": float(np.median(exact_ms)),
        "exact_ms_p95": float(np.percentile(exact_ms, 95)),
        "graph_ms": float(np.median(graph_ms)),
        "graph_ms_p95": float(np.percentile(graph_ms, 95)),
        "graph_recall": float(np.mean(same)),
        "graph_build_s": build_seconds,
    }


def _timed(snapshot: index.Snapshot, queries: Floats, k: int) -> tuple[list[float], list[set[int]]]:
    milliseconds, found = [], []
    for query in queries[:10]:  # warm up
        snapshot.search(query, k, None, frozenset())
    for query in queries:
        start = time.perf_counter()
        hits = snapshot.search(query, k, None, frozenset())
        milliseconds.append(1000 * (time.perf_counter() - start))
        found.append({number for number, _ in hits})
    return milliseconds, found


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exact and graph search.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--queries", type=int, default=200, help="queries a size (default 200)")
    parser.add_argument("--top-k", type=int, default=5, help="memories a query (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    print("| memories | exact ms (p95) | graph ms (p95) | recall | build s |")
    print("|---:|---:|---:|---:|---:|")
    for size in arguments.sizes:
        r = measure(size, arguments.queries, arguments.top_k, arguments.seed)
        exact = f"{r['exact_ms']:.3f} ({r['exact_ms_p95']:.3f})"
        graph = f"{r['graph_ms']:.3f} ({r['graph_ms_p95']:.3f})"
        recall, build = f"{r['graph_recall']:.3f}", f"{r['graph_build_s']:.1f}"
        print(f"| {size:,} | {exact} | {graph} | {recall} | {build} |", flush=True)
        results.append(r)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
