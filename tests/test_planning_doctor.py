"""What the doctor finds, on machines as they should be and not."""

import importlib.metadata
import json

import jax
import pytest
from training_cases import write_store

from crosscoder_jax import cli
from crosscoder_jax.planning import doctor
from crosscoder_jax.planning.doctor import Finding, Needs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "store"
    write_store(folder)
    return folder


def states(findings):
    return {finding.name: finding.state for finding in findings}


def test_a_machine_on_which_tests_run_is_fit(store, tmp_path):
    findings = list(doctor.examine(store=store, output=tmp_path / "run", seconds=0.01))
    assert "broken" not in states(findings).values()
    assert set(states(findings)) == {
        "versions",
        "settings",
        "devices",
        "store",
        "output",
        "disk",
        "compile cache",
    }
    assert all(finding.remedy for finding in findings if finding.state != "ok")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_versions_that_are_too_old_are_named_with_what_installs_newer_ones(monkeypatch):
    versions = {"optax": "0.2.7", "flax": None}

    def version(name):
        if versions.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, "999.0")

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = doctor.check_versions()
    assert finding.state == "broken"
    assert finding.remedy == "pip install 'flax>=0.12.8' 'optax>=0.2.8'"


@pytest.mark.parametrize(
    ("jaxlib", "platform", "flags", "state"),
    [
        ((0, 10, 2), "gpu", "", "warning"),
        ((0, 11, 0), "gpu", "--xla_other", "warning"),
        ((0, 11, 0), "gpu", "--xla_backend_extra_options=-nvptx-allow-ftz-atomics", "ok"),
        ((0, 11, 1), "gpu", "", "ok"),
        ((0, 10, 1), "gpu", "", "ok"),
        ((0, 10, 2), "cpu", "", "ok"),
    ],
)
def test_the_slow_scatter_of_some_versions_is_known(jaxlib, platform, flags, state):
    (finding,) = doctor.check_settings({"XLA_FLAGS": flags}, platform, jaxlib)
    assert finding.state == state
    assert ("-nvptx-allow-ftz-atomics" in finding.remedy) == (state == "warning")


def test_settings_that_slow_down_are_told():
    (finding,) = doctor.check_settings({"JAX_DISABLE_JIT": "1", "JAX_DEBUG_NANS": "0"}, "cpu", (0, 12, 0))
    assert (finding.state, finding.remedy) == ("warning", "unset JAX_DISABLE_JIT")


def test_fewer_devices_than_the_plan_has_are_too_few():
    number = jax.device_count()
    assert doctor.check_devices(Needs(chips=number)).state == "ok"
    finding = doctor.check_devices(Needs(chips=number + 1))
    assert finding.state == "broken"
    assert f"needs {number + 1} devices, and there are {number}" in finding.says


@pytest.mark.parametrize(("idle", "extra"), [("GPU", "cuda13"), ("TPU", "tpu")])
def test_an_accelerator_that_jax_does_not_use_is_told(idle, extra, monkeypatch):
    monkeypatch.setattr(doctor, "_idle_accelerator", lambda: idle)
    finding = doctor.check_devices(Needs())
    assert finding.state == "broken"
    assert finding.remedy == f"pip install 'crosscoder-jax[{extra}]'"


def test_a_store_that_is_too_slow_for_the_plan_is_broken(store):
    assert doctor.check_store(store, 1.0, 0.01).state == "ok"
    finding = doctor.check_store(store, 1e15, 0.01)
    assert finding.state == "broken"
    assert "the plan needs 1,000,000,000" in finding.says


def test_a_store_that_is_not_there_is_broken(tmp_path):
    finding = doctor.check_store(tmp_path / "none", 0.0, 0.01)
    assert finding.state == "broken"
    assert "there is no such folder" in finding.says


def test_a_folder_that_cannot_be_written_to_is_broken(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert list(doctor.check_output(tmp_path, 0, 1)) == [
        Finding("output", "broken", f"{tmp_path}: permission denied", f"chmod u+w {tmp_path}")
    ]


@pytest.mark.parametrize(
    ("kind", "hosts", "state"),
    [
        ("ext4", 1, "ok"),
        ("ext4", 2, "broken"),
        ("nfs4", 2, "ok"),
        ("fuse.gcsfuse", 2, "ok"),
        ("tmpfs", 2, "broken"),
    ],
)
def test_several_hosts_need_a_folder_that_they_share(kind, hosts, state, tmp_path, monkeypatch):
    mounts = [("/", "overlay"), (str(tmp_path), kind), (f"{tmp_path}-other", "nfs")]
    monkeypatch.setattr(doctor, "_mounts", lambda: mounts)
    assert states(doctor.check_output(tmp_path / "runs" / "one", 0, hosts))["output"] == state


def test_a_disk_needs_room_for_one_checkpoint_more_than_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 3 * 10**9}))
    assert states(doctor.check_output(tmp_path, 10**9, 1))["disk"] == "ok"
    (_, disk) = doctor.check_output(tmp_path, 10**9 + 1, 1)
    assert (disk.state, disk.says) == ("broken", "3.0 GB free, and 3 checkpoints are 3.0 GB")


def test_a_compile_cache_is_wanted(tmp_path):
    assert doctor.check_cache(None).state == "warning"
    assert doctor.check_cache(str(tmp_path / "cache")).state == "ok"
    assert doctor.check_cache("gs://bucket/cache").state == "ok"


def write_plan(path, **changes):
    mesh = {"data": 1, "latent": 2, "chips": 2, "store_bytes_per_s": None, "bytes_per_chip": {"total": 5}}
    path.write_text(json.dumps({"cheapest": [1, 2], "checkpoint_bytes": 7, "meshes": [mesh]} | changes))
    return path


def test_a_plan_says_what_is_needed(tmp_path):
    assert Needs.read(write_plan(tmp_path / "plan.json")) == Needs(0.0, 7, 5, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cheapest": None}, "no mesh of it fits"),
        ({"meshes": []}, "is no plan"),
        ({"cheapest": [4, 4]}, "is no plan"),
    ],
)
def test_what_is_no_plan_is_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        Needs.read(write_plan(tmp_path / "plan.json", **changes))


def test_the_command_fails_when_something_is_broken(store, tmp_path, capsys):
    cli.main(["doctor", "--store", str(store), "--seconds", "0.01"])
    assert "broken" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--store", str(tmp_path / "none")])
    assert exit_.value.code == 1
    printed = capsys.readouterr().out
    assert "broken   store: " in printed
    assert "fix: " in printed
