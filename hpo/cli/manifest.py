"""`hpo manifest`: a study for Kubernetes, printed."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hpo import __version__
from hpo.cli.options import Artifacts, Storage
from hpo.errors import InputError
from hpo.paths import Home
from hpo.workers.kubernetes import LABEL, QUANTITY, job_name, manifests, require_name

THIS_HOST = ("localhost", "127.0.0.1", "::1")
NEXT = """\
# Study {study} on Kubernetes. Once, in the same namespace, from files that hold the secrets:
#   kubectl{namespace} create secret generic {storage} --from-file=password=secrets/database
#   kubectl{namespace} create secret generic {dashboard} --from-file=password=secrets/dashboard \
--from-file=token=secrets/token
# Then feed this to: kubectl apply -f -
# Look: kubectl{namespace} port-forward service/hpo-dashboard 8080:8080
# A Job that has ended is not run again by apply: kubectl{namespace} delete job {job}
"""


@dataclass(frozen=True)
class ManifestOptions:
    """The options of `hpo manifest`. Raises InputError for what Kubernetes would refuse."""

    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="Name of the study, or a study file (.toml), which makes the study if it is new.",
        ),
    ]
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Pods.")] = 1
    image: Annotated[
        str, typer.Option(metavar="IMAGE", help="What the Dockerfile makes, where pods find it.")
    ] = f"hpo:{__version__}"
    namespace: Annotated[str | None, typer.Option(metavar="NAME", show_default="kubectl's own")] = (
        None
    )
    cpus: Annotated[int, typer.Option(metavar="N", min=1, help="Processors of each worker.")] = 2
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of each worker, 1 GiB of it for batches.")
    ] = "4Gi"
    gpus: Annotated[
        int, typer.Option(metavar="N", min=0, max=1, help="GPUs of each worker: 0 or 1.")
    ] = 0
    data_claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Claim with the images, mounted read-only.", show_default="none"
        ),
    ] = None
    data_path: Annotated[
        str, typer.Option(metavar="DIR", help="Where it is mounted: `data/` of a study file.")
    ] = "/srv/hpo/data"
    home_claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Claim that all workers may write, for checkpoints and caches: a trial goes on in "
            "another pod from its last epoch.",
            show_default="none: such a trial begins anew, unless there are artifacts",
        ),
    ] = None
    artifacts: Artifacts = None
    artifacts_secret: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Secret whose keys are the variables that the artifacts need, such as "
            "AWS_ACCESS_KEY_ID.",
            show_default="none",
        ),
    ] = None
    storage_secret: Annotated[
        str, typer.Option(metavar="NAME", help="Secret with the database's `password`.")
    ] = "hpo-storage"
    dashboard_secret: Annotated[
        str, typer.Option(metavar="NAME", help="Secret with `password` and `token`.")
    ] = "hpo-dashboard"
    storage: Storage = None

    def __post_init__(self) -> None:
        require_name("--namespace", self.namespace, LABEL)
        for name in ("data_claim", "home_claim", "artifacts_secret", "storage_secret",
                     "dashboard_secret"):  # fmt: skip
            require_name(f"--{name.replace('_', '-')}", getattr(self, name))
        if not QUANTITY.fullmatch(self.memory):
            raise InputError(f"--memory {self.memory!r}: a number and a unit, such as 4Gi or 500Mi")
        if not self.data_path.startswith("/") or ":" in self.data_path:
            raise InputError(
                f"--data-path {self.data_path!r}: an absolute path, such as /srv/hpo/data"
            )
        if self.artifacts is not None and "://" not in self.artifacts:
            raise InputError(
                f"--artifacts {self.artifacts!r}: pods see no folder of this machine; a URL, "
                "such as s3://BUCKET/FOLDER (a volume of the cluster: --home-claim)"
            )
        if not self.image or re.search(r"\s", self.image):
            raise InputError(f"--image {self.image!r}: the name of an image, such as hpo:1.0")


def manifest(**given: Any) -> None:
    """Print what runs a study on Kubernetes: an Indexed Job of workers, a dashboard and its
    service.

    Nothing is started, and no database is asked. Secrets are named, never printed; the comment on
    top says how they are made. Pods that are moved or die are replaced; their trials go on.

    Example: hpo manifest studies/digits.toml --workers 4 --storage
    postgresql+psycopg://hpo@database/hpo
    """
    from hpo.storage.artifacts import normal

    name, source = _study(given["study"])
    if given["artifacts"]:
        given["artifacts"] = normal(given["artifacts"])
    options = ManifestOptions(**given | {"study": name, "storage": _reachable(given["storage"])})
    typer.echo(_comment(options) + _yaml(manifests(vars(options) | {"source": source})), nl=False)


# One parameter of the command for each field.
manifest.__signature__ = inspect.signature(ManifestOptions, eval_str=True)  # type: ignore[attr-defined]


def _study(study: str) -> tuple[str, str | None]:
    """Its name and, of a file, the text."""
    from hpo.definition.studyconfig import StudyConfig
    from hpo.definition.studyfile import StudyFile

    if study.endswith(".toml"):
        file = StudyFile.load(Path(study))
        return file.name, file.text
    return StudyConfig.parse({"name": study}).name, None


def _reachable(storage: str | None) -> str:
    """The URL for pods, without its password: that is in the secret."""
    from hpo.storage.url import for_others, parse, show

    url = parse(storage or Home.default().storage)
    if url.get_backend_name() == "sqlite":
        raise InputError(
            f"{show(url)}: pods do not share a file; name a server's database with --storage "
            "postgresql+psycopg://USER@HOST/NAME"
        )
    if url.host is None or url.host in THIS_HOST:
        raise InputError(
            f"{show(url)}: to a pod that host is the pod itself; name the database's host as the "
            "cluster knows it"
        )
    return for_others(url)


def _comment(options: ManifestOptions) -> str:
    return NEXT.format(
        study=options.study,
        namespace=f" --namespace {options.namespace}" if options.namespace else "",
        storage=options.storage_secret,
        dashboard=options.dashboard_secret,
        job=job_name(options.study),
    )


def _yaml(documents: list[dict[str, Any]]) -> str:
    """Readable: keys in our order, text of several lines as a block."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    return yaml.dump_all(
        documents,
        Dumper=Dumper,
        sort_keys=False,
        width=100,
        explicit_start=True,
        allow_unicode=True,
    )
