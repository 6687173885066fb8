"""What `ringjax bench` does with its options: run, print, write."""

from collections.abc import Sequence
from pathlib import Path

from ringjax.benchmarks import compare, environment, table, torch_peer, train, transformers_peer
from ringjax.benchmarks.attention import run_attention, works
from ringjax.benchmarks.config import AttentionBench, GenerateBench, TrainBench
from ringjax.benchmarks.rows import Row
from ringjax.training.config import RunConfig
from ringjax.training.distributed import is_main
from ringjax.training.mesh import simulate_devices


def bench_attention(config: AttentionBench, arguments: list[str]) -> bool:
    """Run `ringjax bench attention`; whether no result was wrong. `arguments` are those of `ringjax`."""
    simulate_devices(config.simulated_devices)
    torch = _torch(config)  # before JAX takes the devices' memory
    about = environment.describe(arguments)
    folder = Path(config.output) if config.output else None
    rows: list[Row] = []
    print("\n".join(environment.header(about)), flush=True)

    def done(row: Row) -> None:
        rows.append(row)
        print(table.line(row), flush=True)
        if folder is not None:  # what is measured stays, whatever ends the command
            table.write_results(folder, "results.json", _plain(rows, about))

    run_attention(config, lambda message: print(message, flush=True), done, torch)
    notes = table.notes(rows)
    table.print_rows(rows, notes)
    if folder is not None:
        from ringjax.benchmarks.plot import plot_rows

        table.write_results(folder, "results.md", table.markdown(rows, notes, about))
        title = f"{about['devices']} × {about['device']}, jax {about['versions'].get('jax', '?')}"
        plot_rows(rows, folder / "plot.png", title)
        print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")
    return all(row.good for row in rows)


def _torch(config: AttentionBench) -> list[dict]:
    if "torch" not in config.peers:
        return []
    return torch_peer.run(
        works(config), config.passes, python=config.torch_python, devices=config.devices, repeats=config.repeats,
        warmup=config.warmup, run_seconds=config.run_seconds, say=lambda message: print(message, flush=True),
    )  # fmt: skip


def _plain(rows: list[Row], about: dict) -> dict:
    return {"environment": about, "rows": [row.plain() for row in rows], "notes": table.notes(rows)}


def bench_train(runs: Sequence[tuple[str, RunConfig]], config: TrainBench, arguments: list[str]) -> bool:
    """Run `ringjax bench train` for each variant; whether losses were finite. `arguments` are those of `ringjax`."""
    for _, run in runs:
        train.prepare(run)
    about = environment.describe(arguments)
    say = (lambda message: print(message, flush=True)) if is_main() else lambda message: None
    say("\n".join(environment.header(about)))
    folder = Path(config.output) if config.output and is_main() else None
    results: list[tuple[str, train.TrainResult]] = []
    for name, run in runs:
        result = train.run_train(run, config, say)
        results.append((name, result))
        measured = train.lines(result, about["device"], about["devices"])
        say("\n".join([*([name] if name else []), *(f"  {key:14s} {value}" for key, value in measured)]))
        if result.profile is not None:
            say("\n".join(["", *result.profile.lines()]))
        if folder is not None:  # what is measured stays, whatever ends the command
            table.write_results(folder, "results.json", {"environment": about, **_plain_results(results)})
    body = table.markdown_table(("", ""), train.lines(results[0][1], about["device"], about["devices"]))
    if len(results) > 1:
        body = table.markdown_table(compare.COLUMNS, compare.rows(results))
        say("\n".join(["", *body]))
    if folder is not None:
        text = table.page("Training", about, body)
        if (profile := results[0][1].profile) is not None:
            text += "\n".join(["", "## Where the time of a step goes", "", *profile.lines()])
        table.write_results(folder, "results.md", text)
        say(f"{folder}: results.json, results.md")
    return all(result.good for _, result in results)


def _plain_results(results: Sequence[tuple[str, "train.TrainResult"]]) -> dict:
    """One result as itself, several by their names."""
    if len(results) == 1 and not results[0][0]:
        return {"result": results[0][1].plain()}
    return {"results": {name: result.plain() for name, result in results}}


def bench_generate(config: GenerateBench, arguments: list[str]) -> bool:
    """Run `ringjax bench generate`; `arguments` are those of `ringjax`."""
    from ringjax.benchmarks import generate
    from ringjax.benchmarks import generate_table as pages

    say = lambda message: print(message, flush=True)  # noqa: E731
    simulate_devices(config.simulated_devices)
    models = {size: generate.model_config(size, config.dtype) for size in config.sizes}
    peers = transformers_peer.run(config, models, say) if config.peers else []  # before JAX takes the memory
    about = environment.describe(arguments)
    say("\n".join(environment.header(about)))
    folder = Path(config.output) if config.output else None
    results: list[generate.Result] = []
    splits: list[generate.Split] = []
    profiles: list[generate.TokenProfile] = []
    copied = generate.copy_bandwidth() if about["platform"] == "gpu" else None
    if copied:
        say(f"a plain copy reads and writes {copied / 1e12:.2f} TB/s")

    def write() -> None:
        if folder is None:
            return
        plain = {"environment": about, "copy_bandwidth": copied, "peers": peers}
        plain |= {"results": [r.plain() for r in results], "splits": [s.plain() for s in splits]}
        plain["profiles"] = [p.plain() for p in profiles]
        table.write_results(folder, "results.json", plain)

    def done(result: generate.Result) -> None:
        results.append(result)
        say("  " + "  ".join(pages.cells(result, peers)))
        write()

    def split_done(split: generate.Split) -> None:
        splits.append(split)
        say("  " + "  ".join(pages.split_cells(split)))
        write()

    def profile_seen(profile: generate.TokenProfile) -> None:
        profiles.append(profile)
        say("\n".join(["", *pages.profile_lines(profile)]))
        write()

    generate.run_splits(config, split_done)
    generate.run_generate(config, done, profile_seen, say)
    body = table.markdown_table(pages.COLUMNS, [pages.cells(result, peers) for result in results])
    if splits:
        body += ["", *table.markdown_table(pages.SPLIT_COLUMNS, [pages.split_cells(split) for split in splits])]
    if copied:
        body += ["", f"A plain copy reads and writes {copied / 1e12:.2f} TB/s on this device."]
    for profile in profiles:
        body += ["", *pages.profile_lines(profile)]
    if folder is not None:
        table.write_results(folder, "results.md", table.page("Generation", about, body))
        if splits:
            pages.plot_splits(splits, folder / "splits.png", f"{about['device']}, jax {about['versions'].get('jax')}")
        say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")
    return True
