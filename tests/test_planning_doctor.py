"""What the doctor finds, on machines as they should be and not."""

import importlib.metadata
import json
import shlex
import types

import jax
import pytest
from processes import Together, free_port
from training_cases import write_store

from crosscoder_jax import cli
from crosscoder_jax.configs import config_to_json
from crosscoder_jax.planning import PlanConfig, Topology, doctor
from crosscoder_jax.planning.doctor import Finding, Needs
from crosscoder_jax.planning.replanning import options_of, topology_of
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.muon import Muon


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
        "products",
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
    assert finding.remedy.startswith(f"crosscoder-jax plan --topology cpu:{number} ")


def test_one_of_several_hosts_needs_its_part_of_the_devices():
    number = jax.device_count()
    assert doctor.check_devices(Needs(chips=4 * number), hosts=4).state == "ok"
    finding = doctor.check_devices(Needs(chips=4 * number + 1), hosts=4)
    assert finding.state == "broken"
    says = f"the plan's mesh needs {number + 1} devices on each of its 4 hosts, and there are {number} here"
    assert says in finding.says
    assert finding.remedy.startswith(f"crosscoder-jax plan --topology cpu:{4 * number} ")


@pytest.mark.parametrize("told", [None, 2])
def test_a_plan_of_several_hosts_is_compared_with_one_of_them(told):
    """With what the plan says of its hosts, or what is said instead."""
    needs = Needs(chips=2 * jax.device_count(), hosts=2)
    assert states(doctor.examine(needs=needs, hosts=told))["devices"] == "ok"
    assert states(doctor.examine(needs=needs, hosts=1))["devices"] == "broken"


def device(platform, kind, gib=None, coords=None):
    stats = None if gib is None else {"bytes_limit": round(gib * 2**30)}
    return types.SimpleNamespace(
        platform=platform, device_kind=kind, memory_stats=lambda: stats, coords=coords
    )


@pytest.mark.parametrize(
    ("platform", "needed", "environment", "remedy"),
    [
        # 75 % of 80 GiB are JAX's by default, and 95 % are 76.
        ("gpu", 75, {}, "export XLA_CLIENT_MEM_FRACTION=0.95"),
        ("gpu", 75, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75"}, "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
        ("gpu", 77, {}, "crosscoder-jax plan"),
        ("gpu", 61, {"XLA_CLIENT_MEM_FRACTION": "0.95"}, "crosscoder-jax plan"),
        ("tpu", 61, {}, "crosscoder-jax plan"),
    ],
)
def test_more_memory_is_taken_only_where_there_is_more(platform, needed, environment, remedy):
    needs = Needs(chip_bytes=needed * 2**30)
    finding = doctor._too_small(needs, 1, [device(platform, "A", 60, (0, 0, 0))], environment)
    assert finding.state == "broken"
    assert finding.remedy.startswith(remedy)
    assert doctor._too_small(Needs(chip_bytes=60 * 2**30), 1, [device(platform, "A", 60)], {}) is None


def test_a_device_that_computes_nonsense_is_left_out(monkeypatch):
    broken = jax.local_devices()[1]
    monkeypatch.setattr(doctor, "_computes", lambda device: device != broken)
    finding = doctor.check_devices(Needs())
    assert (finding.state, finding.remedy) == ("broken", "unset XLA_FLAGS")
    assert str(broken) in finding.says


@pytest.mark.parametrize(
    ("platform", "environment", "remedy"),
    [
        ("gpu", {}, "export CUDA_VISIBLE_DEVICES=0,2"),
        ("gpu", {"CUDA_VISIBLE_DEVICES": "4,5,6"}, "export CUDA_VISIBLE_DEVICES=4,6"),
        ("tpu", {}, "gcloud compute tpus tpu-vm delete NAME --zone ZONE  # and create it anew"),
    ],
)
def test_how_a_device_is_left_out(platform, environment, remedy):
    devices = [device(platform, "A") for _ in range(3)]
    assert doctor._without(devices[1:2], devices, environment) == remedy


@pytest.mark.parametrize(
    ("devices", "hosts", "topology"),
    [
        ([device("cpu", "cpu")] * 4, 2, "cpu:8"),
        ([device("gpu", "NVIDIA H100 80GB HBM3")] * 8, 2, "16xH100-80GB"),
        ([device("gpu", "NVIDIA A100-SXM4-40GB")], 1, "1xA100-40GB"),
        ([device("gpu", "NVIDIA A100-SXM4-80GB")], 1, "1xA100-80GB"),
        ([device("gpu", "NVIDIA H200")], 1, "1xH200-141GB"),
        ([device("gpu", "Tesla T4")], 1, "TOPOLOGY"),
        ([device("tpu", "TPU v5p", None, (x, y, 1)) for x in (2, 3) for y in (0, 1)], 1, "v5p:2x2x1"),
        ([device("tpu", "TPU v6 lite", None, (x, y, 0)) for x in (0, 1) for y in range(4)], 1, "v6e:2x4"),
        ([device("tpu", "TPU v5p", None, (0, 0, 0))], 2, "TOPOLOGY"),
    ],
)
def test_what_is_here_is_named_as_plan_takes_it(devices, hosts, topology):
    assert topology_of(devices, hosts) == topology
    if topology != "TOPOLOGY":
        assert Topology.parse(topology).num_chips == len(devices) * hosts


PLANNED = PlanConfig(Topology.parse("cpu:2"), (6, 5), 64)


@pytest.mark.parametrize(
    "planned",
    [
        PLANNED,
        PlanConfig(
            **{"topology": PLANNED.topology, "widths": (8,), "num_latents": 128, "k": 2.5, "batch_size": 64},
            **{"dtype": "float32", "precision": "default", "aux_k_weight": 0.0, "micro_batches": 2},
            **{"is_rematerialized": True, "pre_acts": "bfloat16", "is_optimizer_spread": True},
            optimizer=Adam(first_moment="bfloat16", second_moment="factored"),
            stored_dtype="float32",
        ),
        PlanConfig(PLANNED.topology, (8,), 128, optimizer=Muon(first_moment="bfloat16")),
    ],
)
def test_the_remedy_plans_the_same_run(planned):
    words = shlex.split(f"--topology cpu:2 {options_of(planned)} --json")
    assert cli.parse("plan", words).config() == planned


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
    mesh = {
        **{"data": 1, "latent": 2, "chips": 2, "hosts": 1, "store_bytes_per_s": None},
        **{"bytes_per_chip": {"total": 5}},
    }
    plan = {"cheapest": [1, 2], "checkpoint_bytes": 7, "meshes": [mesh], "config": config_to_json(PLANNED)}
    path.write_text(json.dumps(plan | changes))
    return path


def test_a_plan_says_what_is_needed(tmp_path):
    assert Needs.read(write_plan(tmp_path / "plan.json")) == Needs(
        0.0, 7, 5, 2, 1, "--sources 6,5 --num-latents 64 --k 100.0 --batch-size 2048 --dtype bfloat16"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cheapest": None}, "no mesh of it fits"),
        ({"meshes": []}, "is no plan"),
        ({"cheapest": [4, 4]}, "is no plan"),
        ({"config": {"topology": 3}}, "config"),
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


def doctors(folder, *options, second=""):
    """Two processes of two devices that look together; the second one runs some code before."""
    mains = [f"import sys; {code}from crosscoder_jax.cli import main; main()" for code in ("", second)]
    words = ["doctor", "--num-processes", "2", "--coordinator", f"127.0.0.1:{free_port()}", *options]
    words += ["--output", folder / "out" / "run", "--process-id"]
    (folder / "out").mkdir()
    commands = [["-c", main, *words, index] for index, main in enumerate(mains)]
    return Together(commands, folder / "logs", devices=2)


def test_processes_look_together(store, tmp_path):
    """All devices are the plan's, and what one writes the other sees; the first alone is heard."""
    mesh = {"data": 2, "latent": 2, "chips": 4, "hosts": 2, "store_bytes_per_s": 1.0}
    mesh |= {"bytes_per_chip": {"total": 5}}
    plan = write_plan(tmp_path / "plan.json", cheapest=[2, 2], meshes=[mesh])
    with doctors(tmp_path, "--plan", plan, "--store", store, "--seconds", "0.01") as both:
        assert both.wait(120) == [0, 0], both.output()
        printed = both.output()
    assert "4 x cpu, each of them computes" in printed
    assert f"{tmp_path / 'out'} can be written to, and all processes see it" in printed
    assert printed.count("versions: ") == 1
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left behind"


def test_what_is_broken_in_any_process_is_told_and_fails_all(tmp_path):
    """The second one does not see the first one's file, as on a disk of its own, and has an old library."""
    second = (
        "from crosscoder_jax.planning import doctor; doctor._appears = lambda file: False; "
        "doctor.check_versions = lambda: doctor.Finding('versions', 'broken', 'old', 'pip install new'); "
    )
    mesh = {"data": 2, "latent": 4, "chips": 8, "hosts": 2, "store_bytes_per_s": 1.0}
    mesh |= {"bytes_per_chip": {"total": 5}}
    plan = write_plan(tmp_path / "plan.json", cheapest=[2, 4], meshes=[mesh])
    with doctors(tmp_path, "--plan", plan, second=second) as both:
        assert both.wait(120) == [1, 1], both.output()
        printed = both.output()
    assert "broken   versions (process 1): old" in printed
    assert f"what process 0 writes to {tmp_path / 'out'} processes [1] do not see" in printed
    assert f"fix: mkdir -p {tmp_path / 'out' / 'run'} && mount -t nfs SERVER:/EXPORT" in printed
    assert "the plan's mesh needs 8 devices, and there are 4 in 2 processes (cpu)" in printed
    assert "fix: crosscoder-jax plan --topology cpu:4 --sources 6,5" in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_products_that_are_not_compiled_are_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(doctor.native, "missing", lambda: "no C++ compiler was there")
    finding = doctor.check_products()
    assert finding.state == "warning"
    assert "no C++ compiler was there" in finding.says
    assert "install a C++ compiler" in finding.remedy
    monkeypatch.setenv(doctor.native.SWITCH, "0")
    assert doctor.check_products().remedy == f"unset {doctor.native.SWITCH}"
    monkeypatch.setattr(doctor.native, "missing", lambda: None)
    assert doctor.check_products().state == "ok"
