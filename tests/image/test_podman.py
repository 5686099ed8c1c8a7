"""Podman as an engine, with storage of its own and an image of some megabytes that is made of this machine's files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError, EngineError, NotWarmError
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.engines import podman as podman_engine
from chatterbox_prewarm.image.engines.connect import connect
from chatterbox_prewarm.image.engines.engine import Run, run_build
from chatterbox_prewarm.image.engines.podman import PodmanEngine
from chatterbox_prewarm.image.oci import Image, to_documents
from tests.helpers.images import layer_of
from tests.image.conftest import copy_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.image.layer import Layer
    from tests.image.conftest import Storage

BASE = "chatterbox-prewarm-test:base"
PROGRAMS = ("sh", "cat", "env", "grep", "id", "ln", "ls", "mkdir", "mkfifo", "seq", "sleep", "stat", "touch", "tr")
DOCKERFILE = """
ARG KIND=bad
FROM scratch AS system
COPY root /
FROM system AS kind-bad
RUN ["sh", "-c", "exit 1"]
FROM system AS kind-good
ARG WORD
RUN --mount=type=secret,id=word --mount=type=secret,id=missing --mount=type=cache,target=/cache,sharing=locked \\
    --mount=type=bind,from=system,source=/bin,target=/mnt/bin \\
    echo "$WORD $(cat /run/secrets/word) $(ls /mnt/bin | grep -c cat)" > /cache/word && cat /cache/word > /word
FROM kind-${KIND} AS chosen
FROM system AS base
COPY --from=chosen /word /word
RUN mkdir -m 1777 /var /var/cache /var/cache/chatterbox-prewarm /tmp
LABEL first="a label"
ENV FIRST="a variable"
EXPOSE 8000
STOPSIGNAL SIGTERM
WORKDIR /srv
USER 12345:12345
ENTRYPOINT ["sh", "-c"]
CMD ["echo by default"]
FROM base AS unneeded
RUN ["sh", "-c", "exit 1"]
"""


@pytest.fixture(scope="module")
def engine(storage: Storage) -> Iterator[PodmanEngine]:
    assert storage.root.is_dir()
    with contextlib.closing(PodmanEngine()) as podman:
        yield podman


@pytest.fixture(scope="module")
def base(engine: PodmanEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with a shell, built as `build` builds: of a Dockerfile that uses what ours does."""
    context = tmp_path_factory.mktemp("context")
    copy_programs(context / "root", *PROGRAMS)
    (context / "root" / "etc").mkdir()
    (context / "root" / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (context / "Dockerfile").write_text(DOCKERFILE)
    secret = context / "secret"
    secret.write_text("sesame")
    run_build(
        engine,
        [
            *("--network=none", "--secret", f"id=word,src={secret}"),
            *("--build-arg", "KIND=good", "--build-arg", "WORD=open"),
            *("--target", "base", "--tag", BASE, str(context)),
        ],
    )
    return BASE


def ask(*arguments: str) -> str:
    return subprocess.run(["podman", *arguments], capture_output=True, text=True, check=True).stdout


def made() -> list[str]:
    """Names of what there is besides the base: containers, and images."""
    images = ask("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    return ask("ps", "--all", "--quiet").split() + [
        name for name in images if name != f"localhost/{BASE}" and "<none>" not in name
    ]


def shell(engine: PodmanEngine, image: str, script: str) -> str:
    return engine.run(Run(image=image, command=[script]))[1]


def test_the_engine_says_what_it_is(engine: PodmanEngine, storage: Storage) -> None:
    assert engine.facts.name == "podman"
    assert ask("--version").split()[-1] == engine.facts.version
    assert engine.facts.default_runtime in {"runc", "crun"}
    assert engine.facts.free is not None
    assert abs(engine.facts.free - shutil.disk_usage(storage.root).free) < 5_000_000_000


def test_a_build_skips_what_its_target_does_not_need_and_keeps_no_secret(engine: PodmanEngine, base: str) -> None:
    assert shell(engine, base, "cat /word; ls -A /run/secrets /cache 2>/dev/null | grep -c .; true").split() == [
        *("open", "sesame", "1", "0")
    ]


def test_a_build_has_the_default_network_without_a_name(engine: PodmanEngine) -> None:
    arguments = ["--network=default", "--tag", "a:b", "."]
    assert engine.build_command(arguments) == ["podman", "build", "--tag", "a:b", "."]
    assert "--network=host" in engine.build_command(["--network=host", "."])


def test_podman_has_no_classic_builder(engine: PodmanEngine) -> None:
    with pytest.raises(EngineError, match="podman has no classic builder"):
        engine.build_command(["."], classic=True)


def test_a_build_that_fails_says_so(engine: PodmanEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
    with pytest.raises(EngineError, match="the build ended with status"):
        run_build(engine, ["--tag", "chatterbox-prewarm-test:failed", str(tmp_path)])
    printed = capfd.readouterr()
    assert "COPY nothing" in printed.err, "the log passes by, on standard error"
    assert printed.out == ""
    assert not engine.exists("chatterbox-prewarm-test:failed")


def test_a_container_is_isolated(engine: PodmanEngine, base: str) -> None:
    script = """
    id -u; id -g; grep -c 12345 /etc/passwd; ls /sys/class/net | tr '\\n' ' '; echo
    grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | tr -d '\\t'
    for place in / /srv /run /etc /tmp /var/cache/chatterbox-prewarm; do touch $place/x 2>/dev/null && echo $place; done
    grep -E '^tmpfs (/tmp|/var/cache/chatterbox-prewarm) ' /proc/mounts | grep -c noexec
    stat -c '%a %n' /tmp /var/cache/chatterbox-prewarm
    cat /bin/id > /var/cache/chatterbox-prewarm/id && stat -c %s /var/cache/chatterbox-prewarm/id | grep -c .
    env | grep -i -c _proxy; grep SigBlk /proc/self/status | tr -d '\\t'
    """
    assert shell(engine, base, script).split("\n") == [
        *("12345", "12345", "0", "lo "),
        *("CapEff:0000000000000000", "CapBnd:0000000000000000", "NoNewPrivs:1"),
        *("/tmp", "/var/cache/chatterbox-prewarm"),
        *("1", "1777 /tmp", "1777 /var/cache/chatterbox-prewarm", "1", "0"),
        *("SigBlk:0000000000000000", ""),
    ]
    assert made() == []


@pytest.mark.usefixtures("base")
def test_no_proxy_of_this_machine_reaches_a_container(engine: PodmanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert shell(engine, BASE, "env | grep -i -c _proxy; true") == "0\n"


def test_a_container_that_bakes_may_write_and_has_no_network_either(engine: PodmanEngine, base: str) -> None:
    script = "touch /srv/x && ls /srv && ls /sys/class/net"
    _, output = engine.run(Run(image=base, command=[script], isolated=False))
    assert output == "x\nlo\n"


def test_output_and_errors_are_kept_apart_however_large(engine: PodmanEngine, base: str) -> None:
    status, output = engine.run(Run(image=base, command=["echo no >&2; seq 1 100000 | tr '\\n' ' '"]))
    assert status == 0
    assert output == "".join(f"{number} " for number in range(1, 100001))


def test_an_exit_code_is_an_error_or_allowed(engine: PodmanEngine, base: str) -> None:
    failing = Run(image=base, command=["echo out; echo missed >&2; exit 13"])
    with pytest.raises(NotWarmError, match="status 13: missed") as raised:
        engine.run(failing)
    assert "out" not in raised.value.message
    allowed = Run(image=base, command=["echo out; exit 13"], allowed=(0, 13))
    assert engine.run(allowed) == (13, "out\n")
    with pytest.raises(EngineError, match="status 3"):
        engine.run(Run(image=base, command=["exit 3"]))
    assert made() == []


def test_what_is_followed_passes_by_and_is_in_the_error(
    engine: PodmanEngine, base: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match="status 14: step 1\nstep 2"):
        engine.run(Run(image=base, command=["echo step 1 >&2; echo out; echo step 2 >&2; exit 14"], follow=True))
    printed = capfd.readouterr()
    assert "step 1\nstep 2\n" in printed.err
    assert "out" not in printed.err + printed.out


def test_a_container_that_cannot_start_is_no_exit_code_of_its_program(engine: PodmanEngine, storage: Storage) -> None:
    layer = layer_of({"file": b"x"})
    settings = {"Entrypoint": ["/no/such/program"]}
    config = {"architecture": "amd64", "os": "linux", "config": settings, "rootfs": {"type": "layers", "diff_ids": []}}
    before = storage.layers()
    image = add_layers(Image(config=config, layers=()), [layer], Change(), created="2026-01-01T00:00:00Z")
    engine.load("scratch", [layer], image, "chatterbox-prewarm-test:empty")
    assert storage.layers() == before + 1
    for isolated in (True, False):
        with pytest.raises(EngineError, match="podman could not run"):
            engine.run(Run(image="chatterbox-prewarm-test:empty", command=[], isolated=isolated))
    engine.forget("chatterbox-prewarm-test:empty")
    assert storage.layers() == before
    assert made() == []


def test_an_image_that_is_not_there_is_said(engine: PodmanEngine) -> None:
    with pytest.raises(EngineError, match="there is no image 'chatterbox-prewarm-test:none'"):
        engine.run(Run(image="chatterbox-prewarm-test:none", command=[]))
    with pytest.raises(EngineError, match="has no image"):
        engine.image("chatterbox-prewarm-test:none")
    with pytest.raises(EngineError, match="cannot look for 'Not A Name'"):
        engine.exists("Not A Name")


def test_files_go_in_and_a_folder_comes_out(engine: PodmanEngine, storage: Storage, base: str, tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.wav", tmp_path / "out"
    clip.write_bytes(os.urandom(100_000))
    clip.chmod(0o600)
    out.mkdir()
    script = "stat -c '%a %u' /tmp/fox.wav; mkdir -p /tmp/state/sub && cat /tmp/fox.wav > /tmp/state/sub/copy"
    container = Run(
        image=base,
        command=[script],
        isolated=False,
        files={PurePosixPath("/tmp/fox.wav"): clip},
        export=(PurePosixPath("/tmp/state"), out),
    )
    assert engine.run(container) == (0, "444 0\n")
    assert [path.relative_to(out).as_posix() for path in sorted(out.rglob("*"))] == ["sub", "sub/copy"]
    assert (out / "sub" / "copy").read_bytes() == clip.read_bytes()
    with pytest.raises(BadInputError, match=r"reading .*clip"):
        engine.run(Run(image=base, command=["true"], files={PurePosixPath("/tmp/a"): tmp_path / "no-clip"}))
    assert made() == []
    assert storage.spooled() == []


@pytest.mark.parametrize(
    ("script", "error", "word"),
    [
        ("mkdir /tmp/state && ln -s /etc/passwd /tmp/state/link", EngineError, "neither a file nor a folder"),
        ("mkdir /tmp/state && mkfifo /tmp/state/pipe", EngineError, "neither a file nor a folder"),
        ("echo file > /tmp/state", BadInputError, "is no folder"),
        ("echo nothing", EngineError, "cannot copy /tmp/state out"),
    ],
)
def test_what_is_no_folder_of_files_does_not_come_out(
    engine: PodmanEngine, base: str, tmp_path: Path, script: str, error: type[Exception], word: str
) -> None:
    export = (PurePosixPath("/tmp/state"), tmp_path)
    with pytest.raises(error, match=word):
        engine.run(Run(image=base, command=[script], isolated=False, export=export))
    assert list(tmp_path.rglob("*")) == []
    assert made() == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("isolated", [True, False])
def test_a_container_that_is_interrupted_is_removed(base: str, tmp_path: Path, sent: int, isolated: bool) -> None:
    """Isolated it is run at once, and otherwise with a file, so that it is made and started."""
    (tmp_path / "file").write_text("x")
    program = f"""
import signal, sys
from pathlib import Path, PurePosixPath
from chatterbox_prewarm.image.engines.engine import Run
from chatterbox_prewarm.image.engines.podman import PodmanEngine
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
files = {{}} if {isolated} else {{PurePosixPath("/tmp/file"): Path({str(tmp_path / "file")!r})}}
PodmanEngine().run(
    Run(image={base!r}, command=["echo runs >&2; sleep 1000"], isolated={isolated}, files=files, follow=True)
)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "runs\n"
            assert len(made()) == 1
            process.send_signal(sent)
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in {130, 143, -signal.SIGINT}
    assert made() == []


def test_a_container_that_takes_too_long_is_removed(base: str) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match="did not end within 2 s"):
        PodmanEngine(timeout=2.0).run(Run(image=base, command=["sleep 1000"]))
    assert time.monotonic() - started < 30
    assert made() == []


@pytest.fixture
def larger(engine: PodmanEngine, base: str) -> Iterator[tuple[str, Layer, Image]]:
    """The base with a layer more."""
    layer = layer_of({"opt/warm/state": b"warm"})
    labels = {"second": "x" * 300_000}  # labels of a state with many files; no command line has room for them
    change = Change(labels=labels, environment={"SECOND": "another", "FIRST": "changed"})
    image = add_layers(engine.image(base), [layer], change, created="2026-01-01T00:00:00Z")
    tag = "chatterbox-prewarm-test:larger"
    engine.load(base, [layer], image, tag)
    yield tag, layer, image
    engine.forget(tag)


def test_of_an_image_with_more_layers_the_new_ones_alone_travel(
    engine: PodmanEngine, storage: Storage, base: str
) -> None:
    before = storage.layers()
    layer = layer_of({"opt/warm/state": os.urandom(100)})
    image = add_layers(engine.image(base), [layer], Change(), created="2026-01-01T00:00:00Z")
    engine.load(base, [layer], image, "chatterbox-prewarm-test:more")
    assert storage.layers() == before + 1
    assert made() == ["localhost/chatterbox-prewarm-test:more"]
    assert storage.spooled() == []
    engine.forget("chatterbox-prewarm-test:more")
    assert storage.layers() == before


def test_an_image_with_more_layers_is_what_was_asked_for(
    engine: PodmanEngine, base: str, larger: tuple[str, Layer, Image]
) -> None:
    tag, layer, image = larger
    below, found = engine.image(base), engine.image(tag)
    assert found.diff_ids == (*below.diff_ids, f"sha256:{layer.diff_id}") == image.diff_ids
    assert to_documents(found)[1].digest == to_documents(image)[1].digest, "the same configuration, to the byte"
    assert found.labels["second"] == "x" * 300_000
    assert found.labels["first"] == "a label"
    settings = found.config["config"]
    assert "FIRST=changed" in settings["Env"]
    assert settings["Entrypoint"] == ["sh", "-c"]
    assert settings["Cmd"] == ["echo by default"]
    assert settings["User"] == "12345:12345"
    assert settings["ExposedPorts"] == {"8000/tcp": {}}
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["WorkingDir"] == "/srv"
    made_layers = [entry for entry in found.config["history"] if not entry.get("empty_layer")]
    assert len(made_layers) == len(found.diff_ids)
    assert shell(engine, tag, "cat /opt/warm/state /word; echo $FIRST") == "warmopen sesame 1\nchanged\n"
    assert engine.run(Run(image=tag, command=[])) == (0, "by default\n")


def test_an_image_with_more_layers_is_whole_for_others(larger: tuple[str, Layer, Image], tmp_path: Path) -> None:
    """Its manifest was made without the sizes of the layers below."""
    tag, _, image = larger
    ask("save", "--quiet", "--format=docker-archive", f"--output={tmp_path}/archive.tar", tag)
    with tarfile.open(tmp_path / "archive.tar") as tar:
        (saved,) = json.load(tar.extractfile("manifest.json") or io.BytesIO())
        digests = [
            hashlib.sha256((tar.extractfile(name) or io.BytesIO()).read()).hexdigest() for name in saved["Layers"]
        ]
    assert tuple(f"sha256:{digest}" for digest in digests) == image.diff_ids


def test_labels_change_without_a_layer(
    engine: PodmanEngine, storage: Storage, larger: tuple[str, Layer, Image]
) -> None:
    tag, _, image = larger
    before = storage.layers()
    proven = add_layers(image, [], Change(labels={"third": "label"}), created=image.config["created"])
    engine.load(tag, [], proven, "chatterbox-prewarm-test:proven")
    assert storage.layers() == before
    assert engine.image("chatterbox-prewarm-test:proven").labels["third"] == "label"
    assert "third" not in engine.image(tag).labels
    engine.forget("chatterbox-prewarm-test:proven")
    assert shell(engine, tag, "cat /opt/warm/state") == "warm"


def test_layers_on_a_base_that_podman_does_not_have_are_refused(engine: PodmanEngine, base: str) -> None:
    unknown, layer = layer_of({"other": b"x"}), layer_of({"state": b"y"})
    foreign = add_layers(engine.image(base), [unknown], Change(), created="2026-01-01T00:00:00Z")
    image = add_layers(foreign, [layer], Change(), created="2026-01-01T00:00:00Z")
    with pytest.raises(EngineError, match="cannot load 'chatterbox-prewarm-test:foreign'"):
        engine.load(base, [layer], image, "chatterbox-prewarm-test:foreign")
    assert made() == []


def test_names_are_given_moved_and_removed(engine: PodmanEngine, larger: tuple[str, Layer, Image]) -> None:
    tag, _, _ = larger
    other = "registry.example:5000/group/chatterbox-prewarm-test:other"
    assert not engine.exists(other)
    engine.tag(tag, other)
    assert engine.exists(other)
    engine.tag(BASE, other)
    assert engine.image(other).diff_ids == engine.image(BASE).diff_ids
    engine.forget(other)
    engine.forget(other)
    assert not engine.exists(other)
    assert engine.exists(tag)
    assert engine.exists(BASE)
    with pytest.raises(EngineError, match="cannot tag"):
        engine.tag("chatterbox-prewarm-test:none", other)


def test_the_name_goes_and_a_container_of_somebody_stays(engine: PodmanEngine, base: str) -> None:
    tag = "chatterbox-prewarm-test:used"
    image = add_layers(engine.image(base), [], Change(labels={"used": "yes"}), created="2026-01-01T00:00:00Z")
    engine.load(base, [], image, tag)
    container = ask("create", "--network=none", tag).strip()
    engine.forget(tag)
    assert not engine.exists(tag)
    assert container.startswith(ask("ps", "--all", "--quiet").strip())
    ask("rm", container)


def test_what_a_build_made_on_the_way_stays_for_the_next(engine: PodmanEngine, base: str) -> None:
    before = ask("images", "--all", "--quiet").split()
    engine.tag(base, "chatterbox-prewarm-test:again")
    engine.forget("chatterbox-prewarm-test:again")
    assert ask("images", "--all", "--quiet").split() == before
    assert len(before) > 5


def test_podman_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="'podman' is not installed") as raised:
        connect("podman")
    assert raised.value.next_step == "install podman"


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        ('s/"Version": "4[0-9.]*"/"Version": "4.2.0"/', "podman is 4.2.0; 4.3 is the oldest"),
        ('s/"serviceIsRemote": false/"serviceIsRemote": true/', "works on another machine"),
        ("s/[{]/(/", "something else than facts"),
    ],
)
def test_a_podman_that_cannot_do_it_is_refused(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: str, word: str
) -> None:
    """What another podman would say, since there is only this one."""
    assert storage.root.is_dir()
    program = tmp_path / "podman"
    program.write_text(f"#!/bin/sh\n{shutil.which('podman')} \"$@\" | sed '{edit}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EngineError, match=word):
        PodmanEngine()


def test_a_storage_that_cannot_be_read_is_said(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert storage.root.is_dir()
    (tmp_path / "storage.conf").write_text("[storage]\ndriver = 1\n")
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "storage.conf"))
    with pytest.raises(EngineError, match=r"cannot ask podman what it can do: .*driver"):
        PodmanEngine()


@pytest.mark.parametrize(
    ("name", "content", "gpu"),
    [
        ("nvidia.yaml", "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: []\n", "cdi"),
        ("nvidia.json", '{"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": []}', "cdi"),
        ("other.yaml", "cdiVersion: 0.5.0\nkind: vendor.com/nic\n", ""),
        ("other.yaml", "# kind: nvidia.com/gpu\nkind: nvidia.com/gpu-not\n", ""),
        ("nvidia.txt", "kind: nvidia.com/gpu\n", ""),
    ],
)
def test_a_gpu_is_there_where_a_cdi_specification_names_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str, gpu: str
) -> None:
    assert storage.root.is_dir()
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(podman_engine, "_CDI", (tmp_path / "absent", tmp_path))
    engine = PodmanEngine()
    assert engine.facts.gpu == gpu
    engine.check_device("cpu")
    if gpu:
        engine.check_device("cuda:0")
    else:
        with pytest.raises(EngineError, match="gives containers no GPU"):
            engine.check_device("cuda")
