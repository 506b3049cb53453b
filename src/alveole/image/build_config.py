"""How a built image is run: its base image's configuration with the recipe's over it."""

from alveole.host.process import BASE_ENVIRONMENT
from alveole.model.image import ImageConfig, Recipe


def build_environment(recipe: Recipe, base: ImageConfig) -> dict[str, str]:
    """Of the image's process and of the commands that build it."""
    inherited = dict(entry.partition("=")[::2] for entry in base.env)
    return {"PATH": BASE_ENVIRONMENT["PATH"], **inherited, **recipe.env}


def image_config(recipe: Recipe, base: ImageConfig) -> ImageConfig:
    """What the recipe leaves out is as in ``base``, except that a new entrypoint drops the arguments of the old one."""
    return ImageConfig(
        entrypoint=recipe.entrypoint or base.entrypoint,
        command=recipe.command or (() if recipe.entrypoint else base.command),
        env=tuple(f"{name}={value}" for name, value in build_environment(recipe, base).items()),
        workdir=recipe.workdir or base.workdir,
        user=recipe.user or base.user,
        ports=tuple(dict.fromkeys((*base.ports, *recipe.ports))),
        volumes=base.volumes,
        labels={**base.labels, **recipe.labels},
        stop_signal=recipe.stop_signal or base.stop_signal,
        health=recipe.health or base.health,
        architecture=base.architecture,
    )
