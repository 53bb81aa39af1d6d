"""The Kubernetes manifest that chapter 8 writes: valid for the published schemas, and its parts fit each other."""

import sys
from pathlib import Path
from unittest import mock

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from ddp_tutorial import ranks
from ddp_tutorial.ranks.run import GRACE
from ddp_tutorial.show import notebook
from tests.ranks import NOTEBOOKS, RESILIENT

CHAPTER = NOTEBOOKS / "08_go_multi_node.ipynb"


@pytest.fixture(scope="module")
def manifest() -> str:
    return notebook.written_file(CHAPTER, "ddp_job.yaml")


REFUSALS = (  # of Kubernetes, of ours and of torchrun's parser
    kubernetes_validate.ValidationError,
    kubernetes_validate.SchemaNotFoundError,
    AssertionError,
    SystemExit,
)


def check(text: str) -> None:
    """Raises one of `REFUSALS`."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    kinds = ("Service", "PersistentVolumeClaim", "Job")
    service, claim, job = (next(d for d in documents if d["kind"] == kind) for kind in kinds)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] in ("Never", "OnFailure")  # no schema says so

    on_disruption = {"type": "DisruptionTarget", "status": "True"}
    assert {"action": "Ignore", "onPodConditions": [on_disruption]} in spec.get("podFailurePolicy", {}).get("rules", [])
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    seconds_to_save = float(variables.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE))
    assert seconds_to_save < pod.get("terminationGracePeriodSeconds", 30)  # 30: what Kubernetes gives unasked

    program, *words = container["command"]
    assert program == "torchrun"
    torchrun = get_args_parser().parse_args(words)
    assert int(torchrun.nnodes) == spec["completions"] == spec["parallelism"]
    assert torchrun.rdzv_backend == "c10d" and torchrun.rdzv_id != "none"
    host, _, port = torchrun.rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}" and port.isdecimal()
    assert int(container["resources"]["requests"]["cpu"]) >= int(torchrun.nproc_per_node)

    assert Path(torchrun.training_script).name == RESILIENT.name
    with mock.patch.object(sys, "argv", [torchrun.training_script, *torchrun.training_script_args]):
        ours = ranks.parse("its flags")
    assert not ours.mistake and ours.nnodes == range(spec["completions"], spec["completions"] + 1)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    shared = next(path for path, name in mounts.items() if "persistentVolumeClaim" in volumes[name])
    assert volumes[mounts[shared]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert all(Path(path).is_relative_to(shared) for path in (ours.data_dir, ours.out))


def test_the_manifest_is_valid(manifest):
    check(manifest)
    assert "has not run on a cluster" in manifest


def test_a_broken_manifest_is_refused(manifest):
    for old, new in (
        ("  backoffLimit: 6", "  backOffLimit: 6"),  # a field that Kubernetes does not know
        ("  completions: 2", '  completions: "2"'),
        ("  restartPolicy: Never", "  restartPolicy: Sometimes"),
        ("apiVersion: batch/v1", "apiVersion: v1"),
        ("  completions: 2", "  completions: 3"),
        ("  completionMode: Indexed", "  completionMode: NonIndexed"),
        ("  subdomain: ddp-ranks", "  subdomain: ranks"),
        ("  clusterIP: None", "  clusterIP: 10.0.0.1"),
        ("job-name: ddp", "job-name: other"),
        ("ddp-0.ddp-ranks:29400", "ddp-1.ddp-ranks:29400"),
        ("- --nnodes=2\n            - --nproc", "- --nodes=2\n            - --nproc"),
        ("- --nnodes=2 # the", "- --nnodes=1:2 # the"),
        ("--nproc-per-node=2", "--nproc-per-node=4"),
        ("--out=/shared", "--output=/shared"),
        ("--out=/shared", "--out=/tmp"),
        ("claimName: ddp-shared", "claimName: shared"),
        ("ReadWriteMany", "ReadWriteOnce"),
        ("ddp_resilient.py", "train.py"),
        ("- action: Ignore", "- action: Count"),
        ("type: DisruptionTarget", "type: Ready"),
        ('status: "True"', 'status: "False"'),
        ("PeriodSeconds: 120", "PeriodSeconds: 90"),
        ('value: "90"', 'value: "120"'),
    ):
        assert manifest.count(old) == 1, old
        with pytest.raises(REFUSALS):
            check(manifest.replace(old, new))
            print(f"{new!r} is borne")
