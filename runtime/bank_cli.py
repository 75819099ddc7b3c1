"""``tinyalign-bank``: teach the model and look after its memory bank on the command line."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyalign.runtime.bank_parser import parser
from tinyalign.runtime.cli import complain, guarded, pairs

if TYPE_CHECKING:
    from tinyalign.bank import Memory
    from tinyalign.bank.bank import MemoryBank
    from tinyalign.bank.store import Header
    from tinyalign.runtime.items import Item
    from tinyalign.runtime.model import TinyAlign
    from tinyalign.runtime.teach import Taught

# All else is imported when it is needed, so that --help is quick and Ctrl-C always quiet.

PROGRAM = "tinyalign-bank"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        arguments = parser().parse_args(argv)
        return guarded(PROGRAM, lambda: run(arguments))
    except KeyboardInterrupt:
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # decoders warn about what an error line says better
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show every letter
    verbs = {
        "add": add,
        "list": list_,
        "show": show,
        "search": search,
        "remove": remove,
        "update": update,
        "stats": stats,
        "merge": merge,
        "export": export,
        "import": import_,
        "compact": compact,
        "verify": verify,
        "reindex": reindex,
        "calibrate": calibrate,
    }
    return verbs[arguments.verb](arguments) or 0


# --- teaching ------------------------------------------------------------------------------


def add(arguments: argparse.Namespace) -> int:
    """Add what INPUT names; 1 if pictures of a list could not be read."""
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.teach import header, model_floor, teach

    name = _writable(arguments.bank)
    add_all = _with_ray(arguments) if arguments.ray else teach
    if arguments.workers is not None and not arguments.ray:
        raise InputError("--workers needs --ray")
    items, pictureless = _items(arguments)
    with (
        _model(arguments) as model,
        _growing(name, header(model, Path(name).stem), keep_empty=False) as bank,
    ):
        if not len(bank) and bank.score_floor is None:
            bank.set_score_floor(model_floor(model))
        taught = add_all(model, items, bank, progress=_progress(len(items)))
    alone = Path(arguments.input).is_file() and items[0].place == arguments.input
    if alone and taught.failed:
        raise InputError(taught.failed[0].reason)
    for failure in taught.failed:
        place, reason = failure.item.place, failure.reason
        complain(PROGRAM, reason if place in reason else f"{place}: {reason}")
    if arguments.json:
        failed = [{"place": f.item.place, "reason": f.reason} for f in taught.failed]
        result = {"added": taught.added, "known": taught.known, "failed": failed}
        _print_json(result | {"without_picture": pictureless})
    else:
        counts = (("added", taught.added), ("known already", taught.known))
        parts = [f"{word} {_numbers(ids)}" for word, ids in counts if ids]
        parts += [f"could not read {len(taught.failed)}"] if taught.failed else []
        parts += [f"left out {len(pictureless)} without a picture"] if pictureless else []
        print("; ".join(parts))
    return 1 if taught.failed else 0


def _with_ray(arguments: argparse.Namespace) -> Callable[..., Taught]:
    """``teach`` in Ray's worker processes."""
    from functools import partial

    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.shards import import_ray, teach_with_ray
    from tinyalign.runtime.threads import default_threads

    if arguments.threads is not None:
        raise InputError("with --ray each worker has one thread: give --workers, not --threads")
    workers = default_threads() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise InputError(f"--workers must be 1 or more, not {workers}")
    import_ray()
    return partial(teach_with_ray, workers=workers)


def _items(arguments: argparse.Namespace) -> tuple[list[Item], list[str]]:
    """What INPUT names, with --set on top of its metadata, and its entries without a picture."""
    from dataclasses import replace

    from tinyalign.runtime.errors import InputError, PictureError
    from tinyalign.runtime.items import (
        Item,
        read_csv,
        read_folder,
        read_jsonl,
        read_llava,
        spoken,
    )

    name, text = arguments.input, arguments.text
    path = Path(name)
    listed = name == "-" or path.suffix.lower() in (".jsonl", ".csv", ".json")
    if text is not None and arguments.text_from_name:
        raise InputError("give --text or --text-from-name, not both")
    if listed and (text is not None or arguments.text_from_name):
        raise InputError(f"the texts are in {'the input' if name == '-' else name}: no --text")
    if not listed and text is None and not arguments.text_from_name:
        raise InputError(f"{name} needs a text: --text, or --text-from-name for its file name")
    if text is not None and not text.strip():
        raise InputError("the text is empty: a memory needs a text")
    pictureless: list[str] = []
    if name == "-":
        items = read_jsonl(_read_text(None), "standard input", Path())
    elif path.suffix.lower() == ".json":
        items, pictureless = read_llava(_read_text(path), name, path.parent)
    elif listed:
        reader = read_csv if path.suffix.lower() == ".csv" else read_jsonl
        items = reader(_read_text(path), name, path.parent)
    elif path.is_dir():
        items = read_folder(path, text)
    elif not path.exists():
        raise PictureError(f"no picture at {name}")
    else:
        items = [Item(path, spoken(path) if text is None else text, {}, name)]
    if not items:
        listing = "standard input" if name == "-" else name
        raise InputError(f"{listing} lists nothing to add" + " with a picture" * bool(pictureless))
    extra = pairs(arguments.set, "--set")
    return [replace(item, metadata={**item.metadata, **extra}) for item in items], pictureless


def update(arguments: argparse.Namespace) -> None:
    """Correct one memory."""
    from dataclasses import replace

    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.teach import source_of

    given = (arguments.text, arguments.image, arguments.source, arguments.set, arguments.unset)
    if all(value is None for value in given):
        raise InputError("nothing to update: give --text, --image, --source, --set or --unset")
    changes = pairs(arguments.set, "--set")
    with _open(arguments.bank) as bank:
        old = bank.get(arguments.id)
        metadata = {**old.metadata, **changes}
        for key in arguments.unset or ():
            if metadata.pop(key, None) is None:
                raise InputError(f"memory {old.id} has no metadata {key!r}")
        source = old.source if arguments.source is None else arguments.source
        number = old.id
        if arguments.text is None and arguments.image is None:
            bank.update(old.id, source=source, metadata=metadata)
        else:
            text = old.text if arguments.text is None else arguments.text
            with _model(arguments) as model:
                _check_fingerprint(model, bank)
                new = (
                    model.retold(old, text)
                    if arguments.image is None
                    else model.memory(arguments.image, text)
                )
            if arguments.image is not None and arguments.source is None:
                source = source_of(Path(arguments.image))
            number = bank.replace(old.id, replace(new, source=source, metadata=metadata))
        print(f"updated {old.id}" + (f", now {number}" if number != old.id else ""))


def search(arguments: argparse.Namespace) -> None:
    """The nearest memories with what picture and text add to their scores."""
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.keys import score_parts
    from tinyalign.runtime.prompt import relevant, similarity_word
    from tinyalign.runtime.teach import model_floor

    if arguments.top_k < 1:
        raise InputError(f"--top-k must be 1 or more, not {arguments.top_k}")
    where = pairs(arguments.where, "--where")
    picture = _standard_input() if arguments.image == "-" else arguments.image
    with _model(arguments, arguments.bank or ["default"]) as model:
        query = model.key(picture, arguments.text)
        hits = [
            (bank, hit)
            for bank in model.banks
            for hit in bank.search(query, arguments.top_k, where or None)
        ]
        hits.sort(key=lambda pair: -pair[1].score)
        floors = {
            bank.path: model_floor(model) if bank.score_floor is None else bank.score_floor
            for bank in model.banks
        }
        found = []
        for bank, hit in hits[: arguments.top_k]:
            image, text = score_parts(query, bank.get(hit.id).key, model.parts.keys)
            floor = floors[bank.path]
            word = similarity_word(model.parts.manifest.prompt, hit.score, floor)
            found.append((hit, image, text, floor, word))
        prompt = model.parts.manifest.prompt
    shown = [hit.score for hit, *_, word in found if word]
    last = shown[relevant(prompt, shown) - 1] if shown else 2.0  # the lowest score that is used
    if arguments.json:
        memories = [
            {
                "id": hit.id,
                "bank": hit.bank,
                "score": round(hit.score, 4),
                "image_score": round(image, 4),
                "text_score": round(text, 4),
                "similarity": word,
                "used": hit.score >= last,
                "floor": round(floor, 4),
                "text": hit.text,
                "source": hit.source,
                "metadata": hit.metadata,
            }
            for hit, image, text, floor, word in found
        ]
        _print_json({"memories": memories})
        return
    for hit, image, text, floor, word in found:
        parts = f"{hit.score:.3f} = picture {image:.3f} + text {text:.3f}"
        used = word or f"below the floor of {floor:.3f}, not used"
        if word and hit.score < last:
            used = f"{word}, more than {prompt.margin:g} behind the best, not used"
        print(f"{hit.bank} {hit.id}  {parts}  {used}  {_line(hit.text)}")


# --- looking and correcting ----------------------------------------------------------------


def list_(arguments: argparse.Namespace) -> None:
    """All memories, or those that match."""
    where = pairs(arguments.where, "--where")
    names = arguments.bank or ["default"]
    memories = []
    for name in names:
        with _open(name, read_only=True) as bank:
            label = {"bank": bank.name} if len(names) > 1 else {}
            memories += [(label, memory) for memory in bank.list(where or None)]
    if arguments.json:
        _print_json({"memories": [label | _as_json(memory) for label, memory in memories]})
        return
    for label, memory in memories:
        print(*label.values(), f"{memory.id}  {_line(memory.text)}{_notes(memory)}")


def show(arguments: argparse.Namespace) -> None:
    """One memory in full, its thumbnail on the terminal or to a file."""
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.terminal import can_draw, picture_lines

    with _open(arguments.bank, read_only=True) as bank:
        memory = bank.get(arguments.id)
    if arguments.thumbnail is not None:
        if memory.thumbnail is None:
            raise InputError(f"memory {memory.id} has no thumbnail")
        try:
            Path(arguments.thumbnail).write_bytes(memory.thumbnail)
        except OSError as error:
            raise InputError(f"cannot write {arguments.thumbnail}: {error.strerror}") from None
    if arguments.json:
        extra = {"content_hash": memory.content_hash, "latents": len(memory.latents)}
        _print_json(_as_json(memory) | extra | {"thumbnail": memory.thumbnail is not None})
        return
    print(f"id        {memory.id}")
    print(f"text      {_line(memory.text)}")
    print(f"source    {_line(memory.source)}")
    for pair in _pairs(memory):
        print(f"metadata  {_line(pair)}")
    size = f"{len(memory.thumbnail)} bytes" if memory.thumbnail else "none"
    print(f"thumbnail {size}")
    if memory.thumbnail and can_draw(sys.stdout):
        print(*picture_lines(memory.thumbnail, shutil.get_terminal_size().columns), sep="\n")


def remove(arguments: argparse.Namespace) -> None:
    """Forget memories by id or by metadata."""
    from tinyalign.runtime.errors import InputError

    where = pairs(arguments.where, "--where")
    if bool(arguments.id) == bool(where):
        raise InputError("give the ids to remove, or --where, and not both")
    with _open(arguments.bank) as bank:
        ids = arguments.id or [memory.id for memory in bank.list(where)]
        bank.remove(ids)
    print(f"removed {len(set(ids))}")


def stats(arguments: argparse.Namespace) -> None:
    """A bank in numbers."""
    with _open(arguments.bank, read_only=True) as bank:
        numbers = bank.stats()
    if arguments.json:
        _print_json(asdict(numbers))
        return
    n, near, floor = numbers, numbers.nearest, numbers.score_floor
    print(f"name           {_line(n.name)}")
    print(f"memories       {n.memories:,}, {n.thumbnails:,} of them with a thumbnail")
    if n.file_bytes is not None:
        print(f"bytes          {n.file_bytes:,}, {n.bytes_per_memory:,.0f} a memory")
    print(f"made for       the model with fingerprint {_line(n.fingerprint)}")
    print(f"vectors        keys of {n.key_width} numbers, latents of {n.latent_width}")
    print(f"index          {n.index}" + (f", {n.index_bytes:,} bytes" if n.index_bytes else ""))
    print(f"score floor    {floor:.3f}" if floor is not None else "score floor    the model's own")
    if near is not None:
        shares = f"a tenth {near.p10:.3f}, half {near.p50:.3f}, nine tenths {near.p90:.3f}"
        print(f"nearest other  at most this score: {shares} of the memories")


def verify(arguments: argparse.Namespace) -> int:
    """Read everything; 1 if something is wrong."""
    with _open(arguments.bank, read_only=True) as bank:
        report = bank.verify()
        path = bank.path
    for problem in report.problems:
        complain(PROGRAM, f"{path}: {problem}")
    if not report.sound:
        return 1
    print(f"{path} is sound: {report.memories} memories, index {report.index}")
    return 0


# --- whole banks ---------------------------------------------------------------------------


def merge(arguments: argparse.Namespace) -> None:
    """Add all memories of other banks to one; all are opened before any is added."""
    from tinyalign.bank.store import Header
    from tinyalign.runtime.errors import BankError

    into = _writable(arguments.into)
    with ExitStack() as opened:
        sources = [opened.enter_context(_open(name, read_only=True)) for name in arguments.sources]
        first = sources[0]
        for source in sources:
            if source.fingerprint != first.fingerprint:
                raise BankError(f"{first.path} and {source.path} were made for different models")
        header = Header(first.fingerprint, first.key_width, first.latent_width, Path(into).stem)
        bank = opened.enter_context(_growing(into, header))
        for source in sources:
            added = bank.merge(source)
            print(f"{source.path}: added {added}, known already {len(source) - added}")


def export(arguments: argparse.Namespace) -> None:
    """Write a bank as JSONL and thumbnails."""
    with _open(arguments.bank, read_only=True) as bank:
        print(f"wrote {bank.export(arguments.directory)}")


def import_(arguments: argparse.Namespace) -> None:
    """Add what ``export`` wrote."""
    from tinyalign.bank.transfer import read_header

    name = _writable(arguments.bank)
    header = read_header(Path(arguments.directory))
    with _growing(name, header) as bank:
        print(f"added {bank.import_folder(arguments.directory)}")


def compact(arguments: argparse.Namespace) -> None:
    """Give space back."""
    with _open(arguments.bank) as bank:
        before = bank.stats().file_bytes
        bank.seal() if arguments.seal else bank.compact()
        now = bank.stats().file_bytes
        print("done" if before is None or now is None else f"{before:,} bytes before, {now:,} now")


def reindex(arguments: argparse.Namespace) -> None:
    """Build the search index anew."""
    with _open(arguments.bank) as bank:
        bank.reindex()
        print(f"index {bank.stats().index}")


def calibrate(arguments: argparse.Namespace) -> None:
    """Measure or set the score below which a memory is not used."""
    with _open(arguments.bank) as bank:
        if arguments.reset:
            bank.set_score_floor(None)
            print("score floor: the model's own")
        elif arguments.floor is not None:
            bank.set_score_floor(arguments.floor)
            print(f"score floor {arguments.floor:.3f}")
        else:
            print(f"score floor {bank.calibrate():.3f}, measured on {len(bank)} memories")


# --- inside --------------------------------------------------------------------------------


def _model(arguments: argparse.Namespace, banks: Sequence[str] = ()) -> TinyAlign:
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.model import TinyAlign

    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads must be 1 or more, not {arguments.threads}")
    return TinyAlign.load(arguments.model, arguments.threads, banks, lm=False)


def _open(name: str | None, read_only: bool = False) -> MemoryBank:
    """A bank by its file or address, or the model's own to read."""
    from tinyalign.bank.opening import open_bank
    from tinyalign.runtime.paths import default_model_dir

    if read_only and name in (None, "default"):
        return open_bank(default_model_dir() / "bank.sqlite", read_only=True, label="default")
    return open_bank(name or "", read_only=True) if read_only else open_bank(_writable(name))


@contextmanager
def _growing(name: str, header: Header, keep_empty: bool = True) -> Iterator[MemoryBank]:
    """A bank to add to; created if it is not there. A file is not left behind empty by an error
    (nor, without ``keep_empty``, because there was nothing to add); others may use a collection."""
    from tinyalign.bank.opening import create_bank, is_address, open_if_there

    bank = open_if_there(name, header.fingerprint)
    fresh, empty = bank is None and not is_address(name), False
    if bank is None:
        bank = create_bank(name, header.fingerprint, header.key_width, header.latent_width)
    try:
        with bank:
            try:
                yield bank
            except BaseException:
                keep_empty = False
                raise
            finally:
                empty = not len(bank)
    finally:
        if fresh and empty and not keep_empty:
            Path(name).unlink()  # closing it has removed what lay beside it


def _writable(name: str | None) -> str:
    from tinyalign.runtime.errors import InputError

    if not name or name == "default":
        raise InputError("the model's own bank is never changed: name a bank of your own")
    return name


def _check_fingerprint(model: TinyAlign, bank: MemoryBank) -> None:
    from tinyalign.runtime.errors import BankError

    if bank.fingerprint != model.parts.manifest.fingerprint:
        raise BankError(f"{bank.path} was made for another model: name that model with --model")


def _read_text(path: Path | None) -> str:
    """A UTF-8 file, or standard input without one."""
    from tinyalign.runtime.errors import InputError

    name = "standard input" if path is None else str(path)
    try:
        if path is not None:
            return path.read_bytes().decode("utf-8-sig")
        if sys.stdin is None:
            raise InputError("cannot read standard input: it is closed")
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None


def _standard_input() -> bytes:
    from tinyalign.runtime.cli import standard_input

    return standard_input()


def _progress(total: int) -> Any:
    """Counts on stderr: one line that is rewritten on a terminal, else a line for each batch."""
    terminal = sys.stderr.isatty()

    def report(done: int) -> None:
        if total > 1 and (terminal or done < total):
            end = "\r" if terminal and done < total else "\n"
            print(f"{PROGRAM}: {done} of {total}", end=end, file=sys.stderr, flush=True)

    return report


def _as_json(memory: Memory) -> dict[str, Any]:
    return {
        "id": memory.id,
        "text": memory.text,
        "source": memory.source,
        "metadata": dict(memory.metadata),
    }


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data))


def _notes(memory: Memory) -> str:
    """Source and metadata of a memory for the end of a line."""
    notes = [*([memory.source] if memory.source else []), *_pairs(memory)]
    return f"  ({_line(', '.join(notes))})" if notes else ""


def _pairs(memory: Memory) -> list[str]:
    """Metadata as --where takes it."""
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in memory.metadata.items()
    ]


def _numbers(ids: Sequence[int]) -> str:
    """A few ids, or how many there are."""
    return ", ".join(map(str, ids)) if len(ids) <= 3 else f"{len(ids)} memories"


def _line(text: str) -> str:
    """A text on one line, whatever it holds."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


if __name__ == "__main__":
    sys.exit(main())
