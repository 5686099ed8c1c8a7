"""Podman as an engine, with its own storage and an image of a few megabytes from files of this machine."""

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
from chatterbox_prewarm.image.engines.engine import ContainerRun, run_build
from chatterbox_prewarm.image.engines.podman import PodmanEngine
from chatterbox_prewarm.image.oci import Image, to_documents
from chatterbox_prewarm.system.progress import show_details
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
    """An image with a shell. Its Dockerfile uses the same features as the project's Dockerfile."""
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


def leftovers() -> list[str]:
    """Return the containers, and the images except the base."""
    images = ask("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    return ask("ps", "--all", "--quiet").split() + [
        name for name in images if name != f"localhost/{BASE}" and "<none>" not in name
    ]


def shell(engine: PodmanEngine, image: str, script: str) -> str:
    return engine.run(ContainerRun(image=image, command=[script]))[1]


def test_the_engine_reports_its_properties(engine: PodmanEngine, storage: Storage) -> None:
    assert engine.info.name == "podman"
    assert ask("--version").split()[-1] == engine.info.version
    assert engine.info.default_runtime in {"runc", "crun"}
    assert engine.info.free_bytes is not None
    assert abs(engine.info.free_bytes - shutil.disk_usage(storage.root).free) < 5_000_000_000


def test_a_build_skips_stages_that_the_target_does_not_need_and_keeps_no_secret(
    engine: PodmanEngine, base: str
) -> None:
    assert shell(engine, base, "cat /word; ls -A /run/secrets /cache 2>/dev/null | grep -c .; true").split() == [
        *("open", "sesame", "1", "0")
    ]


def test_the_default_network_is_not_named_on_the_command_line(engine: PodmanEngine) -> None:
    arguments = ["--network=default", "--tag", "a:b", "."]
    assert engine.build_command(arguments) == ["podman", "build", "--tag", "a:b", "."]
    assert "--network=host" in engine.build_command(["--network=host", "."])


def test_podman_has_no_classic_builder(engine: PodmanEngine) -> None:
    with pytest.raises(EngineError, match="podman has no classic builder"):
        engine.build_command(["."], classic=True)


def test_a_failed_build_is_reported(engine: PodmanEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
    with pytest.raises(EngineError, match="the build ended with status"):
        run_build(engine, ["--tag", "chatterbox-prewarm-test:failed", str(tmp_path)])
    printed = capfd.readouterr()
    assert "COPY nothing" in printed.err, "the log goes to standard error"
    assert printed.out == ""
    assert not engine.exists("chatterbox-prewarm-test:failed")


def test_a_container_is_isolated(engine: PodmanEngine, base: str) -> None:
    script = """
    id -u; id -g; grep -c 12345 /etc/passwd; ls /sys/class/net | tr '\\n' ' '; echo
    grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | tr -d '\\t'
    for path in / /srv /run /etc /tmp /var/cache/chatterbox-prewarm; do touch $path/x 2>/dev/null && echo $path; done
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
    assert leftovers() == []


@pytest.mark.usefixtures("base")
def test_no_proxy_of_this_machine_reaches_a_container(engine: PodmanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert shell(engine, BASE, "env | grep -i -c _proxy; true") == "0\n"


def test_a_container_that_bakes_can_write_files_but_has_no_network(engine: PodmanEngine, base: str) -> None:
    script = "touch /srv/x && ls /srv && ls /sys/class/net"
    _, output = engine.run(ContainerRun(image=base, command=[script], isolated=False))
    assert output == "x\nlo\n"


def test_standard_output_is_separate_from_errors_and_may_be_large(engine: PodmanEngine, base: str) -> None:
    status, output = engine.run(ContainerRun(image=base, command=["echo no >&2; seq 1 100000 | tr '\\n' ' '"]))
    assert status == 0
    assert output == "".join(f"{number} " for number in range(1, 100001))


def test_an_exit_code_raises_its_error_unless_it_is_allowed(engine: PodmanEngine, base: str) -> None:
    refused = ContainerRun(image=base, command=["echo out; echo missed >&2; exit 13"])
    with pytest.raises(NotWarmError, match="status 13: missed") as raised:
        engine.run(refused)
    assert "out" not in raised.value.message
    allowed = ContainerRun(image=base, command=["echo out; exit 13"], allowed=(0, 13))
    assert engine.run(allowed) == (13, "out\n")
    with pytest.raises(EngineError, match="status 3"):
        engine.run(ContainerRun(image=base, command=["exit 3"]))
    assert leftovers() == []


def test_standard_error_is_shown_while_the_container_runs_and_is_part_of_the_error(
    engine: PodmanEngine, base: str
) -> None:
    shown: list[str] = []
    show_details(lambda text, *_: shown.append(text))
    try:
        with pytest.raises(EngineError, match="status 14: step 1\nstep 2"):
            engine.run(
                ContainerRun(image=base, command=["echo step 1 >&2; echo out; echo step 2 >&2; exit 14"], follow=True)
            )
    finally:
        show_details(None)
    assert [line for line in shown if "step" in line] == ["step 1", "step 2"]
    assert "out" not in shown


def test_a_container_that_cannot_start_is_reported_as_such(engine: PodmanEngine, storage: Storage) -> None:
    layer = layer_of({"file": b"x"})
    settings = {"Entrypoint": ["/no/such/program"]}
    config = {"architecture": "amd64", "os": "linux", "config": settings, "rootfs": {"type": "layers", "diff_ids": []}}
    before = storage.layers()
    image = add_layers(Image(config=config, layers=()), [layer], Change(), created="2026-01-01T00:00:00Z")
    engine.load("scratch", [layer], image, "chatterbox-prewarm-test:empty")
    assert storage.layers() == before + 1
    for isolated in (True, False):
        with pytest.raises(EngineError, match="podman could not run"):
            engine.run(ContainerRun(image="chatterbox-prewarm-test:empty", command=[], isolated=isolated))
    engine.untag("chatterbox-prewarm-test:empty")
    assert storage.layers() == before
    assert leftovers() == []


def test_a_missing_image_is_reported(engine: PodmanEngine) -> None:
    with pytest.raises(EngineError, match="has no image 'chatterbox-prewarm-test:none'"):
        engine.run(ContainerRun(image="chatterbox-prewarm-test:none", command=[]))
    with pytest.raises(EngineError, match="has no image"):
        engine.image("chatterbox-prewarm-test:none")
    with pytest.raises(EngineError, match="cannot look for 'Not A Name'"):
        engine.exists("Not A Name")


def test_files_are_copied_in_and_a_folder_is_copied_out(
    engine: PodmanEngine, storage: Storage, base: str, tmp_path: Path
) -> None:
    clip, out = tmp_path / "clip.wav", tmp_path / "out"
    clip.write_bytes(os.urandom(100_000))
    clip.chmod(0o600)
    out.mkdir()
    script = "stat -c '%a %u' /tmp/fox.wav; mkdir -p /tmp/state/sub && cat /tmp/fox.wav > /tmp/state/sub/copy"
    container = ContainerRun(
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
        engine.run(ContainerRun(image=base, command=["true"], files={PurePosixPath("/tmp/a"): tmp_path / "no-clip"}))
    assert leftovers() == []
    assert storage.spooled() == []


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("mkdir /tmp/state && ln -s /etc/passwd /tmp/state/link", EngineError, "neither a file nor a folder"),
        ("mkdir /tmp/state && mkfifo /tmp/state/pipe", EngineError, "neither a file nor a folder"),
        ("echo file > /tmp/state", BadInputError, "is not a folder"),
        ("echo nothing", EngineError, "cannot copy /tmp/state out"),
    ],
)
def test_only_a_folder_of_regular_files_is_copied_out(
    engine: PodmanEngine, base: str, tmp_path: Path, script: str, error: type[Exception], message: str
) -> None:
    export = (PurePosixPath("/tmp/state"), tmp_path)
    with pytest.raises(error, match=message):
        engine.run(ContainerRun(image=base, command=[script], isolated=False, export=export))
    assert list(tmp_path.rglob("*")) == []
    assert leftovers() == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("isolated", [True, False])
def test_an_interrupted_container_is_removed(base: str, tmp_path: Path, sent: int, isolated: bool) -> None:
    """Covers both ways to start: `podman run`, and `podman create` and `start` if there are files."""
    (tmp_path / "file").write_text("x")
    program = f"""
import signal, sys
from pathlib import Path, PurePosixPath
from chatterbox_prewarm.image.engines.engine import ContainerRun
from chatterbox_prewarm.image.engines.podman import PodmanEngine
from chatterbox_prewarm.system.progress import show_details
show_details(lambda text, *_: print(text, file=sys.stderr, flush=True))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
files = {{}} if {isolated} else {{PurePosixPath("/tmp/file"): Path({str(tmp_path / "file")!r})}}
PodmanEngine().run(
    ContainerRun(image={base!r}, command=["echo runs >&2; sleep 1000"], isolated={isolated}, files=files, follow=True)
)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            assert "runs\n" in process.stderr
            assert len(leftovers()) == 1
            process.send_signal(sent)
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in {130, 143, -signal.SIGINT}
    assert leftovers() == []


def test_a_container_that_exceeds_the_timeout_is_removed(base: str) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match="did not end within 2 s"):
        PodmanEngine(timeout=2.0).run(ContainerRun(image=base, command=["sleep 1000"]))
    assert time.monotonic() - started < 30
    assert leftovers() == []


@pytest.fixture
def extended(engine: PodmanEngine, base: str) -> Iterator[tuple[str, Layer, Image]]:
    """The base with one additional layer, loaded: its tag, the layer and the image."""
    layer = layer_of({"opt/warm/state": b"warm"})
    labels = {"second": "x" * 300_000}  # a state may have labels that are too long for a command line
    change = Change(labels=labels, environment={"SECOND": "another", "FIRST": "changed"})
    image = add_layers(engine.image(base), [layer], change, created="2026-01-01T00:00:00Z")
    tag = "chatterbox-prewarm-test:extended"
    engine.load(base, [layer], image, tag)
    yield tag, layer, image
    engine.untag(tag)


def test_only_the_new_layers_of_an_image_are_loaded(engine: PodmanEngine, storage: Storage, base: str) -> None:
    before = storage.layers()
    layer = layer_of({"opt/warm/state": os.urandom(100)})
    image = add_layers(engine.image(base), [layer], Change(), created="2026-01-01T00:00:00Z")
    engine.load(base, [layer], image, "chatterbox-prewarm-test:more")
    assert storage.layers() == before + 1
    assert leftovers() == ["localhost/chatterbox-prewarm-test:more"]
    assert storage.spooled() == []
    engine.untag("chatterbox-prewarm-test:more")
    assert storage.layers() == before


def test_a_loaded_image_has_the_requested_configuration_and_layers(
    engine: PodmanEngine, base: str, extended: tuple[str, Layer, Image]
) -> None:
    tag, layer, image = extended
    below, loaded = engine.image(base), engine.image(tag)
    assert loaded.diff_ids == (*below.diff_ids, f"sha256:{layer.diff_id}") == image.diff_ids
    assert to_documents(loaded)[1].digest == to_documents(image)[1].digest, "the same configuration, to the byte"
    assert loaded.labels["second"] == "x" * 300_000
    assert loaded.labels["first"] == "a label"
    settings = loaded.config["config"]
    assert "FIRST=changed" in settings["Env"]
    assert settings["Entrypoint"] == ["sh", "-c"]
    assert settings["Cmd"] == ["echo by default"]
    assert settings["User"] == "12345:12345"
    assert settings["ExposedPorts"] == {"8000/tcp": {}}
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["WorkingDir"] == "/srv"
    with_layer = [entry for entry in loaded.config["history"] if not entry.get("empty_layer")]
    assert len(with_layer) == len(loaded.diff_ids)
    assert shell(engine, tag, "cat /opt/warm/state /word; echo $FIRST") == "warmopen sesame 1\nchanged\n"
    assert engine.run(ContainerRun(image=tag, command=[])) == (0, "by default\n")


def test_a_loaded_image_can_be_saved_with_all_layers(extended: tuple[str, Layer, Image], tmp_path: Path) -> None:
    """Its manifest does not have the sizes of the base's layers."""
    tag, _, image = extended
    ask("save", "--quiet", "--format=docker-archive", f"--output={tmp_path}/archive.tar", tag)
    with tarfile.open(tmp_path / "archive.tar") as tar:
        (saved,) = json.load(tar.extractfile("manifest.json") or io.BytesIO())
        digests = [
            hashlib.sha256((tar.extractfile(name) or io.BytesIO()).read()).hexdigest() for name in saved["Layers"]
        ]
    assert tuple(f"sha256:{digest}" for digest in digests) == image.diff_ids


def test_labels_can_change_without_a_new_layer(
    engine: PodmanEngine, storage: Storage, extended: tuple[str, Layer, Image]
) -> None:
    tag, _, image = extended
    before = storage.layers()
    proven = add_layers(image, [], Change(labels={"third": "label"}), created=image.config["created"])
    engine.load(tag, [], proven, "chatterbox-prewarm-test:proven")
    assert storage.layers() == before
    assert engine.image("chatterbox-prewarm-test:proven").labels["third"] == "label"
    assert "third" not in engine.image(tag).labels
    engine.untag("chatterbox-prewarm-test:proven")
    assert shell(engine, tag, "cat /opt/warm/state") == "warm"


def test_layers_on_an_unknown_base_are_refused(engine: PodmanEngine, base: str) -> None:
    unknown, layer = layer_of({"other": b"x"}), layer_of({"state": b"y"})
    foreign = add_layers(engine.image(base), [unknown], Change(), created="2026-01-01T00:00:00Z")
    image = add_layers(foreign, [layer], Change(), created="2026-01-01T00:00:00Z")
    with pytest.raises(EngineError, match="cannot load 'chatterbox-prewarm-test:foreign'"):
        engine.load(base, [layer], image, "chatterbox-prewarm-test:foreign")
    assert leftovers() == []


def test_tags_are_added_moved_and_removed(engine: PodmanEngine, extended: tuple[str, Layer, Image]) -> None:
    tag, _, _ = extended
    other = "registry.example:5000/group/chatterbox-prewarm-test:other"
    assert not engine.exists(other)
    engine.tag(tag, other)
    assert engine.exists(other)
    engine.tag(BASE, other)
    assert engine.image(other).diff_ids == engine.image(BASE).diff_ids
    engine.untag(other)
    engine.untag(other)
    assert not engine.exists(other)
    assert engine.exists(tag)
    assert engine.exists(BASE)
    with pytest.raises(EngineError, match="cannot tag"):
        engine.tag("chatterbox-prewarm-test:none", other)


def test_untag_removes_the_name_but_not_a_container_that_uses_the_image(engine: PodmanEngine, base: str) -> None:
    tag = "chatterbox-prewarm-test:used"
    image = add_layers(engine.image(base), [], Change(labels={"used": "yes"}), created="2026-01-01T00:00:00Z")
    engine.load(base, [], image, tag)
    container = ask("create", "--network=none", tag).strip()
    engine.untag(tag)
    assert not engine.exists(tag)
    assert container.startswith(ask("ps", "--all", "--quiet").strip())
    ask("rm", container)


def test_untag_keeps_the_intermediate_layers_of_a_build(engine: PodmanEngine, base: str) -> None:
    before = ask("images", "--all", "--quiet").split()
    engine.tag(base, "chatterbox-prewarm-test:copy")
    engine.untag("chatterbox-prewarm-test:copy")
    assert ask("images", "--all", "--quiet").split() == before
    assert len(before) > 5


def test_a_missing_podman_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="'podman' is not installed") as raised:
        connect("podman")
    assert raised.value.next_step == "install podman"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ('s/"Version": "4[0-9.]*"/"Version": "4.2.0"/', "podman 4.2.0 is too old: the Dockerfile needs 4.3 or newer"),
        ('s/"serviceIsRemote": false/"serviceIsRemote": true/', "controls another machine"),
        ("s/[{]/(/", "printed an unknown format"),
    ],
)
def test_an_unsuitable_podman_is_refused(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: str, message: str
) -> None:
    """Edits the output of the installed podman, so that it looks unsuitable."""
    assert storage.root.is_dir()
    program = tmp_path / "podman"
    program.write_text(f"#!/bin/sh\n{shutil.which('podman')} \"$@\" | sed '{edit}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EngineError, match=message):
        PodmanEngine()


def test_an_unreadable_storage_is_reported(storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert storage.root.is_dir()
    (tmp_path / "storage.conf").write_text("[storage]\ndriver = 1\n")
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "storage.conf"))
    with pytest.raises(EngineError, match=r"cannot read the properties of podman: .*driver"):
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
def test_a_gpu_is_available_if_a_cdi_specification_names_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str, gpu: str
) -> None:
    assert storage.root.is_dir()
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(podman_engine, "_CDI", (tmp_path / "absent", tmp_path))
    engine = PodmanEngine()
    assert engine.info.gpu == gpu
    engine.check_device("cpu")
    if gpu:
        engine.check_device("cuda:0")
    else:
        with pytest.raises(EngineError, match="gives containers no GPU"):
            engine.check_device("cuda")
