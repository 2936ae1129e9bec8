#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Contig as it is installed and built upon: test_install.py BUILD_DIR SOURCE_ROOT. Prints TAP."""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback

BUILD, ROOT = sys.argv[1:3]
CASES = []
WORK = tempfile.mkdtemp(prefix="contig-install-")
DEST = f"{WORK}/dest"


def case(function):
    CASES.append(function)
    return function


def run(*command, status=0, **kwargs):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False, timeout=240, **kwargs)
    assert done.returncode == status, (command, done.returncode, done.stdout[-3000:])
    return done.stdout


def installed(pattern):
    found = glob.glob(f"{DEST}/**/{pattern}", recursive=True)
    assert len(found) == 1, (pattern, found)
    return found[0]


def environment():
    libraries = os.path.dirname(installed("libcontig.so"))
    return {**os.environ, "LD_LIBRARY_PATH": libraries, "XDG_RUNTIME_DIR": WORK,
            "PKG_CONFIG_PATH": os.path.dirname(installed("contig.pc")),
            "PKG_CONFIG_SYSROOT_DIR": DEST}


@case
def everything_is_installed():
    run("meson", "install", "-C", BUILD, "--no-rebuild", "--destdir", DEST)
    for name in ("bin/contig", "libcontig-malloc.so", "contig.pc", "include/contig/contig.h",
                 "include/contig/posix.h", "man1/contig.1", "man1/contig-alloc.1",
                 "completions/contig"):
        installed(name)
    for path in glob.glob(f"{DEST}/**/*", recursive=True):
        assert os.path.isdir(path) or os.path.getsize(path) > 0, path


@case
def the_installed_command_finds_its_library():
    shown = run(installed("bin/contig"), "run", "--region", "4M", "sh", "-c", "echo $LD_PRELOAD",
                env=environment())
    assert shown.strip() == installed("libcontig-malloc.so"), shown


@case
def pkg_config_is_enough_to_build_with():
    flags = run("pkg-config", "--cflags", "--libs", "contig", env=environment()).split()
    run("cc", "-Wall", "-Werror", "-o", f"{WORK}/first", f"{ROOT}/examples/first.c", *flags)
    assert run(f"{WORK}/first", env=environment()) == "both are intact\n"
    with open(f"{ROOT}/examples/first.c", encoding="utf-8") as source:
        assert len(source.readlines()) <= 40


@case
def a_meson_subproject_builds():
    project = f"{WORK}/project"
    os.makedirs(f"{project}/subprojects")
    shutil.copytree(ROOT, f"{project}/subprojects/contig",
                    ignore=shutil.ignore_patterns("build*", ".git", ".cache"))
    shutil.copy(f"{ROOT}/examples/first.c", project)
    with open(f"{project}/meson.build", "w", encoding="utf-8") as file:
        file.write("project('user', 'c')\n"
                   "contig = dependency('contig', fallback: ['contig', 'contig_dep'],\n"
                   "  default_options: ['tests=false', 'bench=false'])\n"
                   "executable('first', 'first.c', dependencies: contig)\n")
    bare = {key: value for key, value in os.environ.items() if not key.startswith("PKG_CONFIG")}
    run("meson", "setup", f"{project}/build", project, env=bare)
    run("ninja", "-C", f"{project}/build", "first", env=bare)
    assert run(f"{project}/build/first") == "both are intact\n"


@case
def a_path_that_cannot_be_preloaded_is_refused():
    tree = f"{WORK}/with space"
    for part in ("contig/contig", "malloc/libcontig-malloc.so"):
        os.makedirs(os.path.dirname(f"{tree}/{part}"))
        shutil.copy(f"{BUILD}/tools/{part}", f"{tree}/{part}")
    text = run(f"{tree}/contig/contig", "run", "true", status=125, env=environment())
    assert "space or a colon" in text and text.count("\n") == 1, text
    os.unlink(f"{tree}/malloc/libcontig-malloc.so")
    os.rename(tree, f"{WORK}/alone")
    text = run(f"{WORK}/alone/contig/contig", "run", "true", status=125, env=environment())
    assert "libcontig-malloc.so" in text and text.count("\n") == 1, text


@case
def completion_completes():
    def complete(*words):
        script = (f". {ROOT}/completions/contig; COMP_WORDS=({' '.join(map(repr, words))}); "
                  f"COMP_CWORD={len(words) - 1}; _contig; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
        return run("bash", "-c", script).split()

    assert complete("contig", "rel") == ["release"]
    assert "--timeout" in complete("contig", "alloc", "--ti")
    assert complete("contig", "run", "--backing", "hug") == ["hugetlb"]
    assert "true" in complete("contig", "alloc", "1M", "--", "tru")


@case
def man_pages_are_well_formed():
    for page in glob.glob(f"{ROOT}/docs/man/*.1"):
        text = run("man", "--warnings", "-l", page, env={**os.environ, "MANPAGER": "cat",
                                                         "LC_ALL": "C", "MANWIDTH": "100"})
        assert "EXIT STATUS" in text and "warning" not in text, (page, text[:400])


@case
def the_run_script_says_what_it_can():
    assert "demo" in run(f"{ROOT}/run", "help")
    assert "is not a command" in run(f"{ROOT}/run", "nonsense", status=1)


@case
def test_cases_are_counted():
    def count(*records):
        with open(f"{WORK}/log.json", "w", encoding="utf-8") as log:
            for result, status, text in records:
                log.write(json.dumps({"name": "x", "result": result, "returncode": status,
                                      "stdout": text}) + "\n")
        done = subprocess.run([sys.executable, f"{ROOT}/tests/count.py", log.name],
                              stdout=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stdout.splitlines()[-1]

    two = "1..2\nok 1 - a\nok 2 - b\n"
    assert count(("OK", 0, two), ("OK", 0, "no tap")) == (0, "3 passed, 0 failed")
    assert count(("OK", 0, "1..2\nok 1 - a\nnot ok 2 # SKIP b\n")) == (
        0, "1 passed, 0 failed, 1 skipped")
    assert count(("FAIL", 1, "1..2\nok 1 - a\nnot ok 2 - b\n")) == (1, "1 passed, 1 failed")
    assert count(("FAIL", -11, "1..3\nok 1 - a\n")) == (1, "1 passed, 1 failed")
    assert count(("TIMEOUT", -15, two)) == (1, "2 passed, 1 failed")
    assert count(("FAIL", 1, "")) == (1, "0 passed, 1 failed")
    # A child repeats its parent's buffer; a second group begins with its plan.
    assert count(("OK", 0, "1..1\nok 1 - a\nok 1 - a\n" + two)) == (0, "3 passed, 0 failed")
    assert count() == (1, "0 passed, 1 failed")


def main():
    print(f"1..{len(CASES)}")
    failed = 0
    for number, function in enumerate(CASES, 1):
        try:
            function()
            print(f"ok {number} - {function.__name__}", flush=True)
        except BaseException:  # a case that fails must not hide the others
            failed += 1
            print(f"not ok {number} - {function.__name__}")
            for line in traceback.format_exc().splitlines():
                print(f"# {line}", flush=True)
    shutil.rmtree(WORK, ignore_errors=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
