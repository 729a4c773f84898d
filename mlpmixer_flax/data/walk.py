"""Lists what is in a folder on disk, without hidden files and without what operating systems leave behind."""

import os

_LEFT_BEHIND = {"__MACOSX", "@eaDir"}  # folders that macOS and Synology create, with copies of images


def files_below(root: str, folder: str) -> list[str]:
    """Returns all files in a folder of root and its subfolders, follows links; relative to root, with "/"."""
    found, waiting, seen = [], [folder], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real not in seen:  # links may form a circle
            seen.add(real)
            folders, files = list_folder(real)
            waiting += [f"{folder}/{name}" for name in folders]
            found += [f"{folder}/{name}" for name in files]
    return found


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Returns the folders and files in a folder: sorted names, no hidden ones; a broken link is a file."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _LEFT_BEHIND:
                continue
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif entry.is_symlink() or entry.is_file():
                files.append(entry.name)
    return sorted(folders), sorted(files)
