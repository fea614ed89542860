"""The launch files: their syntax by their own tools, their options by ours, and what they do by stand-ins."""

import copy
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from crosscoder_jax import cli

LAUNCH = Path(__file__).parent.parent / "experiments" / "launch"
SCRIPTS = ["slurm.sbatch", "xpk.sh", "queued_tpu.sh"]
JOBSET = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
SLICE = JOBSET["spec"]["replicatedJobs"][0]["template"]
POD = SLICE["spec"]["template"]["spec"]
CHIPS_OF_HOST = 4
"""Of v5p."""
OPTIONS = ["--store", "s", "--output", "o", "--data-shards", "2"]


def test_every_file_is_told_of():
    readme = (LAUNCH / "README.md").read_text()
    files = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert set(re.findall(r"^\| `(\S+)` \|", readme, flags=re.M)) == files


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".md"))
def test_every_file_begins_with_the_line_that_starts_it(name):
    comment = "".join(re.match(r"(?:#.*\n)+", (LAUNCH / name).read_text())[0].replace("\\\n#", ""))
    assert f"experiments/launch/{name}" in comment


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_scripts(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_kubernetes_takes_the_job_that_a_jobset_holds():
    validate = pytest.importorskip("kubernetes_validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": SLICE["spec"]}
    validate.validate(job, "1.30", strict=True)


FIELDS = {
    "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
    "metadata": {"name": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec": {
        **{"replicatedJobs": list, "network": dict, "successPolicy": dict, "failurePolicy": dict},
        **{"startupPolicy": dict, "suspend": bool, "coordinator": dict, "managedBy": str},
        **{"ttlSecondsAfterFinished": int, "volumeClaimPolicies": list},
    },
    "spec.failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": list},
    "spec.replicatedJobs[]": {
        **{"name": str, "groupName": str, "template": dict, "replicas": int, "dependsOn": list}
    },
    "spec.replicatedJobs[].template": {"metadata": dict, "spec": dict},
}
"""What jobset.x-k8s.io/v1alpha2 has, from its jobset_types.go; the spec of the template is a Job's."""


def unknown_fields(value, path=""):
    """What is not in the table, or of another type, anywhere in a JobSet down to its Job."""
    if path not in FIELDS:
        return []
    if isinstance(value, list):
        return [found for one in value for found in unknown_fields(one, path)]
    found = []
    for name, inner in value.items():
        place = f"{path}.{name}".lstrip(".")
        if type(inner) is not FIELDS[path].get(name):
            found.append(place)
        found += unknown_fields(inner, f"{place}[]" if isinstance(inner, list) else place)
    return found


def test_the_jobset_has_the_fields_of_its_own_api():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown_fields(JOBSET) == []
    # The names of its jobs and pods, such as crosscoder-slice-0-15, are labels of the DNS.
    names = [JOBSET["metadata"]["name"], *(job["name"] for job in JOBSET["spec"]["replicatedJobs"])]
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) for name in names)
    assert len("-".join(names)) + len("-0-15") <= 63
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda spec: spec.update(maxRestarts=3), "spec.maxRestarts"),
        (lambda spec: spec["failurePolicy"].update(maxRestarts="3"), "spec.failurePolicy.maxRestarts"),
        (lambda spec: spec["replicatedJobs"][0].update(count=1), "spec.replicatedJobs[].count"),
        (lambda spec: spec.update(replicatedJobs={}), "spec.replicatedJobs"),
    ],
)
def test_fields_that_a_jobset_has_not_are_seen(change, named):
    changed = copy.deepcopy(JOBSET)
    change(changed["spec"])
    assert unknown_fields(changed) == [named]


def test_skypilot_takes_its_file():
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.num_nodes == 2


def train_options(words):
    assert words[:2] == ["crosscoder-jax", "train"]
    return cli.parse("train", words[2:])


def test_the_jobset_gives_each_host_its_chips_and_the_mesh_all_of_them():
    spec = SLICE["spec"]
    chips = math.prod(int(n) for n in POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = POD["containers"]
    assert spec["parallelism"] == spec["completions"]
    assert int(container["resources"]["limits"]["google.com/tpu"]) == CHIPS_OF_HOST
    assert spec["parallelism"] * CHIPS_OF_HOST == chips
    assert spec["backoffLimit"] == 0
    options = train_options(container["command"])
    assert options.distributed
    assert options.data_shards * options.latent_shards == chips
    assert options.batch_size % options.lanes == options.batch_size % options.data_shards == 0
    # Devices are numbered along the latents first: a host whose chips are whole rows of the mesh shares none
    # of its tokens with another host, and with a lane for each none of its files.
    assert CHIPS_OF_HOST % options.latent_shards == 0
    assert options.lanes % min(spec["parallelism"], options.data_shards) == 0


def test_the_file_of_skypilot_spreads_over_all_gpus():
    command = SKY["run"].replace("\\\n", " ").replace("~/crosscoder/bin/", "")
    for name, value in {"NUM_NODES": "2", "NODE_RANK": "1"}.items():
        command = command.replace(f'"$SKYPILOT_{name}"', value)
    options = train_options(shlex.split(command))
    assert (options.num_processes, options.process_id) == (SKY["num_nodes"], 1)
    gpus = SKY["num_nodes"] * int(SKY["resources"]["accelerators"].split(":")[1])
    assert options.data_shards * options.latent_shards == gpus
    assert options.lanes % SKY["num_nodes"] == 0
    assert options.batch_size % options.data_shards == options.batch_size % options.lanes == 0


@pytest.fixture
def stand_in(tmp_path):
    """Put a program in the place of one that a script calls; it notes its words and does what it is told."""
    notes = tmp_path / "notes"

    def make(name, does):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        noted = f"printf '%s\\n' \"{name} $*\" >> {shlex.quote(str(notes))}"
        program.write_text(f"#!/bin/bash\n{noted}\n{does}\n")
        program.chmod(0o755)

    make.notes = lambda: notes.read_text().splitlines() if notes.exists() else []
    make.environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return make


def run(name, stand_in, options=OPTIONS, **environment):
    return subprocess.run(
        ["bash", LAUNCH / name, *options],
        env=stand_in.environment | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [
        (0, "0", False),
        (75, "0", True),  # saved after SIGTERM
        (76, "0", True),  # stuck
        (134, "3", True),  # another host died
        (1, "0", False),  # a mistake of the user would be made again
        (2, "0", False),
        (75, "100", False),
        (76, "100", False),
    ],
)
def test_slurm_hands_back_what_can_go_on(stand_in, code, restarts, is_requeued):
    stand_in("srun", f"exit {code}")
    stand_in("scontrol", "")
    done = run("slurm.sbatch", stand_in, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    expected = [f"srun crosscoder-jax train --distributed {' '.join(OPTIONS)}"]
    assert stand_in.notes() == expected + ["scontrol requeue 17"] * is_requeued


def test_slurm_waits_for_the_steps_when_it_is_told_to_end_itself(stand_in):
    """Slurm sends SIGTERM to tasks and shell alike: the tasks save meanwhile, and end with 75."""
    stand_in("srun", "trap 'sleep 1; exit 75' TERM; echo up >&2; while :; do sleep 0.1; done")
    stand_in("scontrol", "")
    with subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", *OPTIONS],
        env=stand_in.environment | {"SLURM_JOB_ID": "17"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            assert script.stderr.readline() == "up\n"
            os.killpg(script.pid, signal.SIGTERM)
            time.sleep(0.2)
            os.killpg(script.pid, signal.SIGTERM)
            assert script.wait(30) == 75
        finally:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGKILL)
    assert stand_in.notes()[-1] == "scontrol requeue 17"


def test_xpk_is_told_the_whole_command(stand_in):
    stand_in("xpk", "")
    options = [*OPTIONS, "--frozen", "w_enc"]
    assert run("xpk.sh", stand_in, options, CLUSTER="mine", IMAGE="image", TPU="v5p-128").returncode == 0
    (words,) = stand_in.notes()
    assert words.startswith("xpk workload create --cluster mine --workload crosscoder --tpu-type v5p-128 ")
    command = words.split("--command ")[1]
    assert train_options(shlex.split(command)).frozen == ("w_enc",)


@pytest.mark.parametrize(("name", "missing"), [("xpk.sh", "CLUSTER"), ("queued_tpu.sh", "NAME")])
def test_what_must_be_set_is_asked_for(stand_in, name, missing):
    done = run(name, stand_in)
    assert done.returncode != 0
    assert f"set {missing} to" in done.stderr


def test_a_queued_resource_is_started_again_until_it_is_done_or_gone(stand_in, tmp_path):
    stand_in("sleep", "")
    stand_in(
        "gcloud", 'case "$*" in *describe*) cat "$STATE";; *) echo "$((--LEFT))" >> "$TRIES"; exit 1;; esac'
    )
    (tmp_path / "state").write_text("ACTIVE\n")
    names = {"NAME": "mine", "ZONE": "zone", "MAX_RESTARTS": "2", "LEFT": "1"}
    files = {"STATE": str(tmp_path / "state"), "TRIES": str(tmp_path / "tries")}
    assert run("queued_tpu.sh", stand_in, **names, **files).returncode == 1
    assert len((tmp_path / "tries").read_text().splitlines()) == 2, "as often as MAX_RESTARTS"
    (tmp_path / "state").write_text("SUSPENDED\n")
    done = run("queued_tpu.sh", stand_in, **names, **files)
    assert done.returncode == 75
    assert "mine is not active: queue it anew" in done.stderr
