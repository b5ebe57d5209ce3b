"""`outrider deploy`: files that bring a deployment's machines up, on Ray's cluster launcher or on Kubernetes."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from outrider.cluster.cli.after_dashes import WithCommand, after_dashes
from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.configs.loader import load_config

deploy = typer.Typer(add_completion=False, rich_markup_mode=None)


@deploy.command("deploy", cls=WithCommand)
def deploy_command(
    ctx: typer.Context,
    config: ConfigName,
    to: Annotated[Literal["ray", "kuberay"], typer.Option("--to", help="What reads the file.")],
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where it goes.")],
    overrides: Overrides = [],
    kind: Annotated[
        Literal["RayCluster", "RayJob", "RayService"],
        typer.Option("--kind", help="kuberay: a cluster with our server; a command; a server of Ray Serve."),
    ] = "RayCluster",
) -> None:
    """Write a cluster's file, checked against what will read it: outrider deploy CONFIG --to kuberay --out FILE

    Section `deploy` of the configuration says what the machines are. A RayJob needs `-- COMMAND ...` at the end; its
    configuration is /etc/outrider/outrider.yaml.
    """
    loaded = load_config(config, overrides)
    command = after_dashes(ctx)
    if to == "ray" and (command or kind != "RayCluster"):
        raise ValueError(
            "--kind and -- COMMAND must be left out with --to ray, whose jobs `outrider submit` sends"
        )
    if kind != "RayService" and loaded.replicas.max_replicas > 1:
        raise ValueError(
            "replicas.max_replicas must be 1 unless --to kuberay --kind RayService, got "
            f"{loaded.replicas.max_replicas}"
        )

    from outrider.cluster.deploying.kuberay import manifests, to_yaml
    from outrider.cluster.deploying.launcher import launcher_file
    from outrider.cluster.deploying.validation import check_launcher, check_manifest

    if to == "ray":
        documents = [launcher_file(loaded)]
        check_launcher(documents[0])
    else:
        documents = manifests(loaded, kind, command)
        for document in documents:
            if document["apiVersion"].startswith("ray.io/"):
                check_manifest(document)
    Path(out).write_text(to_yaml(documents), encoding="utf-8")
