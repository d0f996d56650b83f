"""The user's model: import what a target names, call it, and unwrap what comes out.

``user_code`` marks the border to the user's own code: an exception there becomes an error that shows the user's frames.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnprobe.config.frameworks import framework_named_in
from bnprobe.config.nodes import is_node_target
from bnprobe.config.spec import ModelSpec, Spec, is_file_target, split_target, why_missing
from bnprobe.distributed import beat
from bnprobe.errors import (
    BnprobeError,
    EndOfPass,
    ModelError,
    UserCodeError,
    is_library_file,
    message_of,
    place_in_user_code,
    reason_of,
)
from bnprobe.loading import frameworks
from bnprobe.loading.frameworks import Project
from bnprobe.loading.places import recorded_places
from bnprobe.loading.scripts import Import, classes_near, look_at
from bnprobe.numbers import count, listed
from bnprobe.paths import exists, is_file, is_folder, placed, short_path
from bnprobe.wording import command_for, nearest

BatchFunction = Callable[[nn.Module, Any], Any]
"""A function of the user, called as f(model, batch)."""


@dataclass(frozen=True, slots=True)
class user_code(AbstractContextManager[None]):  # noqa: N801
    """Turn an exception of the user's code into a UserCodeError. bnprobe's own errors and Ctrl-C pass unchanged.

    Entered thousands of times, since loss and metric are called on every sample: a class, which a generator takes three
    times as long as.

    Attributes:
        call: What is being called, e.g. ``"calling load_model() of model.py"``.
        passes: Which further exceptions pass unchanged.
        hint: What may help where something is raised, sentences; asked only then.
    """

    call: str
    passes: Callable[[BaseException], bool] = lambda error: False
    hint: Callable[[], str] = lambda: ""

    def __enter__(self) -> None:
        beat()

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        beat()
        if error is None or isinstance(error, BnprobeError | EndOfPass | KeyboardInterrupt) or self.passes(error):
            return
        # All else, since exit() in a model file must not end bnprobe silently.
        said = self.hint() or _without_package(error) or _without_gpu(error) or _other_torch(error)
        raise UserCodeError(self.call, error, said) from error


_EXTRAS = {
    **{name: name for name in ("lightning", "timm", "torchvision", "monai", "onnx", "pandas", "tensorboard", "hydra")},
    "transformers": "huggingface",
    "datasets": "huggingface",
    "torch_geometric": "pyg",
    "omegaconf": "hydra",
}
"""The extra of bnprobe that installs a package that the user's code may import."""


def _without_package(error: BaseException) -> str:
    """What to do about a package that is not installed, a sentence; "" for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not name or name in sys.modules:
        return ""
    if name in _EXTRAS:
        return f'{name} is not installed. Run: pip install "bnprobe[{_EXTRAS[name]}]".'
    return f"If {name} is a package, install it for {sys.executable}, by which bnprobe runs."


_OPERATOR = "operator torchvision::"
"""In what is raised where torchvision's compiled operators cannot be loaded."""


def _other_torch(error: BaseException) -> str:
    """What to do about a torchvision that does not belong to this PyTorch, a sentence; "" for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        if _OPERATOR in message_of(cause):
            return (
                f"torchvision was built for another PyTorch than {torch.__version__}, which cannot load its operators."
                " Install two that belong together, from one index: pip install --force-reinstall torch torchvision"
                " --index-url https://download.pytorch.org/whl/cpu (or cu126, ...)."
            )
        cause = cause.__cause__ or cause.__context__
    return ""


_NO_GPU = (
    "Torch not compiled with CUDA",
    "Found no NVIDIA driver",
    "No CUDA GPUs are available",
    "NVIDIA driver on your",
)
"""What torch says where code asks for a GPU that is not there."""


def _without_gpu(error: BaseException) -> str:
    """What to do about code that asks for a GPU on a machine without one, a sentence; "" for any other error."""
    if not any(each in message_of(error) for each in _NO_GPU):
        return ""
    line = place_in_user_code(error)
    return (
        f"{line or 'Your code'} asks for a GPU, and there is none: leave .cuda() out, or write"
        ' .to("cuda" if torch.cuda.is_available() else "cpu"). bnprobe itself moves the model (--device).'
    )


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be called with a keyword argument of this name."""
    parameters = signature_of(function)
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def signature_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function; empty if Python cannot read its signature."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def required_of(function: Callable[..., Any]) -> list[str]:
    """The parameters without which a function cannot be called."""
    return [
        name
        for name, each in signature_of(function).items()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]


def kind_of(value: object) -> str:
    """A value's type in words: "None", "a tuple of Net and dict", "the class Net"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, tuple | list) and 0 < len(value) <= 4:
        return f"a {type(value).__name__} of {' and '.join(type(part).__name__ for part in value)}"
    name = type(value).__name__ or "object"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


_ABSENT = object()


def attribute(value: object, name: str, default: Any = None) -> Any:
    """An attribute of an object of the user's; the default where there is none, or where its property raises."""
    try:
        return getattr(value, name, default)
    except Exception:  # whatever a property or a __getattr__ of the user's raises
        return default


def has_attribute(value: object, name: str) -> bool:
    """Whether an object of the user's has an attribute that can be read."""
    return attribute(value, name, _ABSENT) is not _ABSENT


@dataclass(frozen=True)
class Described:
    """A class or function with the arguments that a configuration gives it.

    Attributes:
        function: The class or function.
        args: Its keyword arguments.
    """

    function: Any
    args: Mapping[str, Any]


@dataclass(frozen=True)
class UserModule:
    """A Python module of the user, and the user's name for it.

    Attributes:
        module: The executed module.
        name: E.g. "dir/model.py" or "package.module".
        notes: What the reader should know of how it was loaded, one sentence each.
        project: What a framework gave for the model in it; None: nothing.
    """

    module: types.ModuleType
    name: str
    notes: tuple[str, ...] = ()
    project: Project | None = None

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file, to tell whether the code has changed; None without a file."""
        path = Path(self.module.__file__ or "")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def lines_giving(self, keyword: str) -> list[str]:
        """The lines of the file that give an argument of this name, e.g. ["model.py:17"]."""
        path = Path(self.module.__file__ or "")
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" and path.is_file() else ast.Module([], [])
        given = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == keyword]
        return [f"{self.name}:{number}" for number in sorted({node.value.lineno for node in given})]

    def get(self, symbol: str) -> Any:
        """Look up a symbol; dotted names reach into classes and objects.

        Raises:
            ModelError: It does not exist; the message lists the functions, classes and models that do.
        """
        value: Any = self.module
        for part in symbol.split("."):
            with user_code(f"looking up {symbol} in {self.name}"):
                found = hasattr(value, part)
            if not found:
                raise ModelError(self._miss(symbol))
            value = getattr(value, part)
        return value

    def find(self, symbol: str) -> Any | None:
        """Look up a symbol; None if it does not exist or is a submodule."""
        with user_code(f"looking up {symbol} in {self.name}"):
            value = getattr(self.module, symbol, None)
        return None if isinstance(value, types.ModuleType) else value

    def contents(self) -> list[str]:
        """The callables and nn.Modules that this module defines, in words."""
        return [f"{name} ({_kind(value)})" for name, value in self.own().items()]

    def own(self) -> dict[str, Any]:
        """The callables and nn.Modules that this module defines, by name."""
        return {
            name: value for name, value in vars(self.module).items() if not name.startswith("_") and self._is_own(value)
        }

    def _is_own(self, value: object) -> bool:
        if isinstance(value, nn.Module):
            return True
        home = str(getattr(value, "__module__", ""))
        return callable(value) and f"{home}.".startswith(f"{self.module.__name__}.")

    def _miss(self, symbol: str) -> str:
        contents = self.contents()
        close = nearest(symbol, [entry.split(" ")[0] for entry in contents])
        hint = f' Did you mean "{close}"?' if close else ""
        return f'{self.name} has no "{symbol}".{hint} {describe_contents(self)}'


def describe_contents(module: UserModule) -> str:
    """One sentence on the callables and nn.Modules found in a module."""
    contents = module.contents()
    return f"It defines: {', '.join(contents)}." if contents else "It defines no function, class or model."


def resolve(target: str, near: UserModule | None = None) -> tuple[UserModule, str | None]:
    """Execute the module that a target names; return it and the symbol, if one is named.

    Args:
        target: ``file.py[:symbol]``, ``package.module[:symbol]``, ``package.module.symbol`` or ``config.yaml:node``.
        near: A module that is already loaded; its file is not executed again.

    Raises:
        ModelError: The file or module does not exist, or has a syntax error.
        UserCodeError: The module raised while it was loaded.
    """
    location, symbol = split_target(target)
    if is_node_target(target):
        from bnprobe.loading.configured import module_of  # which resolves what its nodes name

        return module_of(location), symbol
    if is_file_target(target):
        return _load_file(location, near), symbol
    if location:
        _refuse_other_files(placed(Path(location)))
    return _import(location, symbol)


def locate(target: str, near: UserModule | None) -> tuple[UserModule, str | None]:
    """Like ``resolve``, where a plain name is a symbol of the module ``near``."""
    if near is not None and target.isidentifier():
        return near, target
    return resolve(target, near)


def _load_file(location: str, near: UserModule | None) -> UserModule:
    path = placed(Path(location))
    if is_folder(path):
        raise ModelError(
            f"{location} is a folder. {_model_in(path)}Name a Python file in it, e.g. {path / 'model.py'}."
        )
    if (missing := why_missing(path)) is not None:
        raise ModelError(f"The file {location} {missing}")
    if not is_file(path):
        raise ModelError(f"{location} is a pipe or a device. Name a Python file.")
    _refuse_other_files(path)
    path = Path(os.path.realpath(path))
    if near is not None and getattr(near.module, "__file__", None) == str(path):
        return near
    # As `python model.py` does: files beside it can be imported, now and later by its functions.
    folder = str(path.parent)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    return _execute(path, location)


def _refuse_other_files(path: Path) -> None:
    if path.suffix == ".py" or not exists(path):
        return
    if exists(path / "__init__.py"):
        return  # a package of the working directory
    kind = "a folder" if is_folder(path) else "not a Python file"
    raise ModelError(
        f"{path} is {kind}. {_model_in(path)}Name a Python file (model.py:symbol) or a module (package.module)."
    )


def _model_in(folder: Path) -> str:
    """How a folder with a model of Hugging Face is named, a sentence; "" for any other."""
    if not is_file(folder / "config.json"):
        return ""
    return f"It has a config.json: a model of Hugging Face is named {shlex.quote(f'hf:{folder}')}. "


def _execute(path: Path, shown: str) -> UserModule:
    """Execute a file as a registered module, so that its classes can be pickled."""
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ModelError(f"{shown} cannot be loaded as a Python module.")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with user_code(f"loading {shown}"):
            notes = _run(path, module, shown)
    except BaseException:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
        raise
    return UserModule(module, shown, notes)


def _run(path: Path, module: types.ModuleType, shown: str) -> tuple[str, ...]:
    # compiled from the source: a cached .pyc may be from another edit within the same second
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ModelError(f"The file {path} could not be read: {reason_of(error)}.") from None
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
        found = look_at(source)
        _refuse_training(found, shown)
        with _without_arguments(path, shown, found.parses):
            exec(code, vars(module))
    except SyntaxError as error:
        if error.filename and Path(error.filename).is_file():
            raise ModelError(_syntax_message(error)) from None
        raise
    return _notes_on_arguments(shown, found.parses)


def _notes_on_arguments(shown: str, line: int | None) -> tuple[str, ...]:
    return () if line is None else (f"{shown} parses arguments in line {line} when it is imported: it was given none.",)


def _refuse_training(found: Import, shown: str) -> None:
    if found.trains is not None:
        raise ModelError(
            f"{shown} trains when it is imported: {found.trains}. Put what trains under"
            f' if __name__ == "__main__": in {shown}, or move the model into a file of its own and name that.'
        )


@contextmanager
def _without_arguments(path: Path, shown: str, line: int | None) -> Iterator[None]:
    """Let a file or module that parses arguments when it is imported find none, rather than those of bnprobe.

    Args:
        path, shown: The file, and the user's name for it.
        line: Where it does; None if it does not.

    Raises:
        ModelError: It needs some.
    """
    if line is None:
        yield
        return
    arguments, said = sys.argv, io.StringIO()
    sys.argv = [str(path)]
    try:
        with redirect_stderr(said):
            yield
    except SystemExit:
        usage = said.getvalue().strip().rpartition("\n")[2].partition("error: ")[2]
        raise ModelError(
            f"{shown} parses arguments when it is imported, in line {line}, and ends without them"
            f"{f' ({usage})' if usage else ''}. Give them default values, or parse them under"
            f' if __name__ == "__main__": in {shown}.'
        ) from None
    finally:
        sys.argv = arguments
        if sys.exc_info()[0] is None:
            sys.stderr.write(said.getvalue())


def _syntax_message(error: SyntaxError) -> str:
    line = f": {error.text.strip()}" if error.text else "."
    file = short_path(Path(error.filename or ""))
    where = f"{file}, line {error.lineno}" if error.lineno else file
    return f"Syntax error in {where} ({error.msg}){line}"


def _module_name(path: Path) -> str:
    """The file's stem if ``import stem`` would load this very file, else a unique name.

    Under the stem, spawned loader processes can import the classes, and another file that imports this one gets the
    same module. A module that already has this name must not be overwritten.
    """
    importlib.invalidate_caches()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return path.stem
    if known is None and path.stem.isidentifier():
        found = importlib.util.find_spec(path.stem)
        if found is not None and found.origin == str(path):
            return path.stem
    return f"bnprobe_user_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def import_from_here() -> None:
    """Let imports find what is in the working directory, also what has come into it since the last one."""
    folder = str(placed(Path()).absolute())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()


def _import(location: str, symbol: str | None) -> tuple[UserModule, str | None]:
    """Import ``package.module``, or ``package`` with the last part as the symbol (as in class_path)."""
    import_from_here()
    try:
        return _import_module(location), symbol
    except _MissingModuleError as error:
        parent, _, last = location.rpartition(".")
        if symbol is not None or not parent or error.missing == parent.split(".")[0]:
            raise
        return _import_module(parent), last


class _MissingModuleError(ModelError):
    def __init__(self, location: str, missing: str) -> None:
        self.missing = missing
        super().__init__(
            f'There is no module "{missing}" (looked for "{location}" in the working directory and among the '
            "installed packages). Name a file as model.py:symbol, or a module as package.module:symbol."
        )


def _import_module(location: str) -> UserModule:
    if not all(part.isidentifier() for part in location.split(".")):
        raise ModelError(f'"{location}" is not the name of a Python file or module.')
    with user_code(f"importing {location}"):
        path, line = _look_at_module(location)
        shown = short_path(path)
        with _without_arguments(path, shown, line):
            return UserModule(_imported(location), location, _notes_on_arguments(shown, line))


def _look_at_module(location: str) -> tuple[Path, int | None]:
    """Refuse a module of the user's, or a package that it is in, that would train when it is imported.

    Returns:
        The file of the first of them that parses arguments, and the line; None: none does.
    """
    parts = location.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name in sys.modules:
            continue
        try:
            found = importlib.util.find_spec(name)
            file = (found.origin if found is not None else None) or ""
            if file.endswith(".py") and not is_library_file(file):
                seen = look_at(Path(file).read_bytes())
                _refuse_training(seen, short_path(Path(file)))
                if seen.parses is not None:
                    return Path(file), seen.parses
        except (ImportError, OSError, SyntaxError, ValueError):  # said by the import itself
            break
    return Path(), None


def _imported(location: str) -> types.ModuleType:
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name and (location == error.name or location.startswith(f"{error.name}.")):
            raise _MissingModuleError(location, error.name) from None
        raise  # the module exists; something that it imports does not
    except SyntaxError as error:
        if error.filename and Path(error.filename).is_file():
            raise ModelError(_syntax_message(error)) from None
        raise


def _kind(value: object) -> str:
    if isinstance(value, type):
        needed = required_of(value) if issubclass(value, nn.Module) else []
        return f"class, needs {' and '.join(needed)}" if needed else "class"
    return "model" if isinstance(value, nn.Module) else "function"


@dataclass(frozen=True)
class LoadedModel:
    """A model and its origin.

    Attributes:
        model: The user's model, without wrappers.
        name: Its name in messages, e.g. "model.py:load_model" or "timm:resnet18".
        module: Where data, forward, loss and metric are looked up; None for a model library.
        notes: What the reader should know, one sentence each.
        wrapped: The user's code returns it in a wrapper, so that its weights have other keys there.
        parameters_alone: Layers lack their running statistics in its checkpoint.
        averaged: Why its weights are taken to be an average, and that averaged weights are in the same file but were
            not used, clauses; None where nothing says so.
        undone: By name of a layer that is plain BN, what its checkpoint shows it to be converted to.
        project: The framework's project that it is, if it is one.
    """

    model: nn.Module
    name: str
    module: UserModule | None
    notes: tuple[str, ...] = ()
    wrapped: bool = False
    parameters_alone: bool = False
    averaged: tuple[str | None, str | None] = (None, None)
    undone: Mapping[str, str] = field(default_factory=dict)
    project: Project | None = None

    def observing(self, batch: Any) -> LoadedModel:
        """The same with what the framework's project shows of itself by a few samples of the training data."""
        if self.project is None or self.project.observe is None:
            return self
        known = self.project.observe(self.model, batch)
        before = self.project
        both = replace(
            before,
            functions={**before.functions, **known.functions},
            taken={**before.taken, **known.taken},
            missing=known.missing,
            goal=known.goal or before.goal,
        )
        return replace(_with_functions(self, known.functions), project=both, notes=(*self.notes, *known.notes))


def load_model(spec: Spec) -> LoadedModel:
    """Load the model that a target names.

    A target with the prefix of a framework names a project of it. Else the first of these that exists: the named
    symbol; ``load_model()``; ``model``. A symbol is an nn.Module, a function or class that is called with the spec's
    ``args`` and returns one, or a project of a framework.

    Raises:
        ModelError: The target does not lead to an nn.Module.
        UserCodeError: The user's code raised.
    """
    with recorded_places():
        return _load_model(spec)


def _load_model(spec: Spec) -> LoadedModel:
    target, args = spec.model.target, spec.model.args
    framework = framework_named_in(target)
    if framework is not None:
        named = frameworks.reader_of(framework).named(target.partition(":")[2], spec)
        return _of_project(named, target, None)
    module, symbol = resolve(target)
    symbol = symbol or _default_symbol(module)
    name, value = f"{module.name}:{symbol}", module.get(symbol)
    if isinstance(value, Described):
        value, args = value.function, {**value.args, **args}
        spec = spec.model_copy(update={"model": ModelSpec(target=target, args=args)})
    reader = frameworks.claiming(value)
    if reader is None or isinstance(value, nn.Module):
        value, spec = _build(value, name, args), spec.model_copy(update={"model": ModelSpec(target=target)})
        reader = frameworks.claiming(value)
    if reader is not None:
        return _of_project(reader.project(value, name, spec), name, module)
    return _loaded(value, name, module)


def _of_project(project: Project, name: str, module: UserModule | None) -> LoadedModel:
    """The model of a framework's project, with its functions beside those of the user's module."""
    loaded = replace(_loaded(project.model, name, module), project=project)
    return replace(_with_functions(loaded, project.functions), notes=(*loaded.notes, *project.notes))


def _with_functions(loaded: LoadedModel, functions: Mapping[str, Any]) -> LoadedModel:
    """The model with a module that has these functions beside those of the user's."""
    home = loaded.module
    if not functions:
        return loaded if home is None else replace(loaded, module=replace(home, project=loaded.project))
    merged = frameworks.beside(functions, home.module if home else None, loaded.name)
    module = UserModule(merged, home.name if home else loaded.name, project=loaded.project)
    return replace(loaded, module=module)


def _default_symbol(module: UserModule) -> str:
    for symbol in ("load_model", "model"):
        if module.find(symbol) is not None:
            return symbol
    projects = [name for name, value in module.own().items() if frameworks.claiming(value) is not None]
    if len(projects) == 1:
        return projects[0]
    raise ModelError(
        f"{module.name} has neither load_model() nor model. {describe_contents(module)} "
        f"Name one of them as {module.name}:NAME, or add load_model().\n{_ways_on(module)}"
    )


_MODEL_MAKER = re.compile(r"(model|net|network|backbone|classifier)$", re.IGNORECASE)


def _ways_on(module: UserModule) -> str:
    """The three nearest ways to a scan, as commands: models first, then classes and functions that make one."""
    own = module.own()
    models = [name for name, value in own.items() if isinstance(value, nn.Module)]
    classes = [name for name, value in own.items() if isinstance(value, type) and issubclass(value, nn.Module)]
    makers = [name for name, value in own.items() if not isinstance(value, type) and _MODEL_MAKER.search(name)]
    classes.sort(key=lambda name: len(required_of(own[name])))  # of classes that need as much, the last is the largest
    ways = []
    for name in dict.fromkeys([*models, *makers, *classes]):
        needed = [] if isinstance(own[name], nn.Module) else required_of(own[name])
        ways.append(" ".join([shlex.quote(f"{module.name}:{name}"), *(f"--model-arg {each}=VALUE" for each in needed)]))
    if not ways:
        ways = [shlex.quote(each) for each in classes_near(Path(module.module.__file__ or ""), "(Lightning)?Module")]
    named = ways or ["FILE.py:NAME", "hf:FOLDER  # a saved model of transformers; or timm:NAME, torchvision:NAME"]
    commands = [command_for(way) for way in named[:2]]
    if len(ways) == 1:
        commands.append(f"bnprobe init --from {ways[0]}  # writes a spec.yaml for it")
    commands.append("bnprobe init  # writes a model.py and a spec.yaml to fill in")
    return "\n".join(f"  {command}" for command in commands)


def _build(value: object, name: str, args: dict[str, Any]) -> nn.Module:
    if isinstance(value, nn.Module):
        if args:
            raise ModelError(f"{name} is already a model, so model.args ({', '.join(args)}) cannot be used.")
        return value
    if not callable(value):
        raise ModelError(f"{name} is {kind_of(value)}, not an nn.Module or a function or class that returns one.")
    with user_code(f"calling {name}({', '.join(args)})"):
        made = value(**args)
    if not isinstance(made, nn.Module):
        raise ModelError(f"{name} returned {kind_of(made)}, not an nn.Module. Return only the model.")
    return made


def require_values(model: nn.Module) -> None:
    """Refuse a model of which parameters or buffers have no values (device meta): it cannot be run.

    Raises:
        ModelError: Names the first of them.
        UserCodeError: They cannot be listed, e.g. for a module of a class without a hash.
    """
    with user_code("listing the parameters and buffers of the model"):
        named = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in named if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{count(len(empty), 'tensor')} of the model without values (device meta): {listed(empty)}. Build it on a"
            " real device, or call model.to_empty(device=...) and load its weights in load_model()."
        )


def require_state(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be saved, before they are made.

    Raises:
        UserCodeError: Its state_dict() raises.
    """
    with user_code("calling state_dict() of the model"):
        model.state_dict()


def unwrapped(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Remove the wrappers of DataParallel, DistributedDataParallel and torch.compile; also a sentence that says so."""
    wrappers = []
    while (inner := _inner(model)) is not None:
        wrappers.append(type(model).__name__)
        model = inner
    if not wrappers:
        return model, None
    return model, f"The model was wrapped in {' in '.join(reversed(wrappers))}; the module inside it is used."


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: compiled code calls no functional form that could be intercepted."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _loaded(model: nn.Module, name: str, module: UserModule | None) -> LoadedModel:
    inner, note = unwrapped(model)
    notes = (*(module.notes if module else ()), *([note] if note else []))
    return LoadedModel(inner, name, module, notes, wrapped=note is not None)


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _as_module(model.module)
    if "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule):
        return _as_module(model._orig_mod)
    return None


def _as_module(value: object) -> nn.Module | None:
    return value if isinstance(value, nn.Module) else None
