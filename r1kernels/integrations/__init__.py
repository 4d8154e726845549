"""Adapters for other trainers, one file each. They use the public API alone, and import nothing until called."""

from importlib.metadata import PackageNotFoundError, version


def check_version(package: str, supported: str, any_version: bool = False) -> None:
    """Raises ImportError unless the installed version of a package begins with `supported`, such as "1.16".

    `any_version` accepts every installed version: what the adapter hooks may have another meaning there.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; this adapter is for {package} {supported}") from None
    if not any_version and not f"{found}.".startswith(f"{supported}."):
        raise ImportError(
            f"{package} is {found}, and this adapter is for {supported}; install {package}=={supported}.*, or "
            "pass any_version=True"
        )
