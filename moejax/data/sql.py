"""Synthetic text-to-SQL documents: one random schema, a few questions in English, and the query that answers each.

Nobody asked these questions and no such tables exist: names, rows and questions are drawn by a seeded generator, in the
shape of public text-to-SQL sets (schema as CREATE TABLE, question, query). Every query is run by sqlite3 on rows drawn
for its schema; one that fails or answers nothing is left out.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# entity -> the parent entities it may refer to
_PARENTS = {
    "customer": ("city", "agent"), "orders": ("customer", "store", "agent"), "product": ("supplier", "category"), "supplier": ("city",),
    "store": ("city",), "agent": ("office",), "office": ("city",), "city": (), "category": (), "student": ("school", "teacher"),
    "school": ("city",), "teacher": ("school",), "course": ("teacher", "school"), "book": ("author", "publisher"), "author": ("city",),
    "publisher": ("city",), "flight": ("airline", "airport"), "airline": (), "airport": ("city",), "employee": ("department", "office"),
    "department": ("office",), "project": ("department", "employee"), "patient": ("doctor", "clinic"), "doctor": ("clinic",),
    "clinic": ("city",), "song": ("album", "singer"), "album": ("singer", "label"), "singer": ("label",), "label": (),
    "match_result": ("team", "stadium"), "player": ("team",), "team": ("city", "stadium"), "stadium": ("city",),
    "invoice": ("customer", "agent"), "ticket": ("customer", "employee"), "sensor": ("machine", "site"), "machine": ("site",),
    "site": ("city",), "vehicle": ("driver", "depot"), "driver": ("depot",), "depot": ("city",),
}  # fmt: skip
_PLURALS = {"city": "cities", "category": "categories", "match_result": "match results", "orders": "orders"}
_NUMBERS = {
    "price": (1, 900), "age": (18, 80), "year": (1950, 2024), "salary": (20000, 150000), "rating": (1, 10), "quantity": (1, 200),
    "capacity": (50, 90000), "weight": (1, 500), "score": (0, 100), "population": (1000, 900000), "distance": (5, 4000),
    "budget": (1000, 800000), "duration": (1, 300), "credits": (1, 12), "stock": (0, 400), "temperature": (1, 120),
    "revenue": (1000, 900000), "height": (150, 210), "pages": (40, 1200),
}  # fmt: skip
_WORDS = {
    "status": ("active", "closed", "pending", "cancelled", "new"),
    "country": ("France", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway", "Chile"),
    "color": ("red", "blue", "green", "black", "white"), "level": ("beginner", "intermediate", "advanced"),
    "region": ("north", "south", "east", "west"), "genre": ("jazz", "rock", "drama", "history", "science"), "grade": ("A", "B", "C", "D"),
    "payment_method": ("card", "cash", "transfer"), "gender": ("female", "male"),
    "language": ("English", "Spanish", "German", "Korean", "Arabic"), "size": ("small", "medium", "large"),
}  # fmt: skip
_NAMES = (
    "Ada", "Bruno", "Chen", "Dora", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mona", "Nora", "Omar", "Priya",
    "Quinn", "Rosa", "Sven", "Tara", "Uma", "Viktor", "Wanda", "Yara", "Zoe", "Alpha", "Delta", "Harbor", "Maple", "Orion", "Summit",
    "Willow",
)  # fmt: skip


@dataclass(frozen=True)
class _Table:
    name: str
    numbers: tuple[str, ...]
    words: tuple[str, ...]
    parent: _Table | None
    date: str | None
    rows: list[tuple[object, ...]] = field(default_factory=list, compare=False)

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").removesuffix("s") if self.name == "orders" else self.name.replace("_", " ")

    @property
    def plural(self) -> str:
        return _PLURALS.get(self.name, self.label + ("es" if self.label.endswith(("s", "ch", "x")) else "s"))

    def columns(self) -> list[tuple[str, str]]:
        key = [("id", "INTEGER PRIMARY KEY"), ("name", "TEXT NOT NULL")]
        typed = [(name, "INTEGER") for name in self.numbers] + [(name, "TEXT") for name in self.words]
        date = [(self.date, "DATE")] if self.date else []
        link = [(f"{self.parent.name}_id", f"INTEGER REFERENCES {self.parent.name}(id)")] if self.parent else []
        return key + typed + date + link


def generate_document(seed: int, index: int) -> str:
    """Document `index` of the endless series of `seed`: CREATE TABLE statements, then questions as comments with their queries."""
    rng = random.Random(f"moejax sql {seed} {index}")
    tables = _draw_schema(rng)
    connection = sqlite3.connect(":memory:")
    try:
        parts = []
        for table in tables:
            columns = ",\n".join(f"    {name} {kind}" for name, kind in table.columns())
            parts.append(f"CREATE TABLE {table.name} (\n{columns}\n);\n")
            connection.execute(parts[-1])
            _fill(connection, table, rng)
        asked: set[str] = set()
        wanted = rng.randint(5, 10)
        for question, query in _draw_questions(rng, tables, attempts=4 * wanted):
            if query in asked or not _answers(connection, query):
                continue
            asked.add(query)
            parts.append(f"-- {question}\n{query};\n")
            if len(asked) == wanted:
                break
    finally:
        connection.close()
    return "\n".join(parts)


def _draw_schema(rng: random.Random) -> list[_Table]:
    """Two or three tables, parents first; each refers to the one before it."""
    child = rng.choice([name for name, parents in _PARENTS.items() if parents])
    chain = [child]
    while len(chain) < 3 and _PARENTS[chain[0]]:
        parent = rng.choice(_PARENTS[chain[0]])
        if parent in chain:
            break
        chain.insert(0, parent)
    tables: list[_Table] = []
    for name in chain[-rng.randint(2, 3) :]:
        date = rng.choice((None, None, "created_on", "start_date", "updated_on"))
        numbers = tuple(rng.sample(sorted(_NUMBERS), rng.randint(1, 3)))
        words = tuple(rng.sample(sorted(_WORDS), rng.randint(1, 2)))
        tables.append(_Table(name, numbers, words, tables[-1] if tables else None, date))
    return tables


def _fill(connection: sqlite3.Connection, table: _Table, rng: random.Random) -> None:
    parents = [row[0] for row in table.parent.rows] if table.parent else []
    for identity in range(1, rng.randint(12, 24)):
        row: list[object] = [identity, f"{rng.choice(_NAMES)} {rng.choice(_NAMES)}"]
        row += [rng.randint(*_NUMBERS[name]) for name in table.numbers]
        row += [rng.choice(_WORDS[name]) for name in table.words]
        if table.date:
            row.append(f"{rng.randint(2015, 2024)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}")
        if parents:
            row.append(rng.choice(parents))
        table.rows.append(tuple(row))
    marks = ", ".join("?" * len(table.columns()))
    connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", table.rows)


def _answers(connection: sqlite3.Connection, query: str) -> bool:
    try:
        return connection.execute(query).fetchone() is not None
    except sqlite3.Error:
        return False


def _draw_questions(rng: random.Random, tables: list[_Table], attempts: int) -> Iterator[tuple[str, str]]:
    linked = [table for table in tables if table.parent]
    for _ in range(attempts):
        if linked and rng.random() < 0.45:
            yield rng.choice(_JOINS)(rng, rng.choice(linked))
        else:
            yield rng.choice(_SINGLES)(rng, rng.choice(tables))


def _say(name: str) -> str:
    return name.replace("_", " ")


def _condition(rng: random.Random, table: _Table, prefix: str = "") -> tuple[str, str]:
    """A condition on one column of the table, in English and in SQL."""
    if table.date and rng.random() < 0.2:
        year = rng.randint(2016, 2023)
        return f"with {_say(table.date)} after {year}", f"{prefix}{table.date} > '{year}-12-31'"
    if rng.random() < 0.5:
        name = rng.choice(table.words)
        value = rng.choice(_WORDS[name])
        return rng.choice((f"whose {_say(name)} is {value}", f"with {_say(name)} {value}")), f"{prefix}{name} = '{value}'"
    name = rng.choice(table.numbers)
    low, high = _NUMBERS[name]
    value = rng.randint(low, high)
    kind = rng.choice((("more than", ">"), ("less than", "<"), ("at least", ">="), ("at most", "<=")))
    if rng.random() < 0.2:
        top = rng.randint(value, high)
        return f"with {_say(name)} between {value} and {top}", f"{prefix}{name} BETWEEN {value} AND {top}"
    return f"with {_say(name)} {kind[0]} {value}", f"{prefix}{name} {kind[1]} {value}"


def _ask_list(rng: random.Random, t: _Table) -> tuple[str, str]:
    said, where = _condition(rng, t)
    columns = ["name", *rng.sample([*t.numbers, *t.words], rng.randint(0, 2))]
    listed = " and ".join((", ".join(map(_say, columns[:-1])), _say(columns[-1])) if len(columns) > 1 else columns)
    question = rng.choice((f"List the {listed} of {t.plural} {said}.", f"What are the {listed} of all {t.plural} {said}?"))
    return question, f"SELECT {', '.join(columns)} FROM {t.name} WHERE {where}"


def _ask_two(rng: random.Random, t: _Table) -> tuple[str, str]:
    (said_1, where_1), (said_2, where_2) = _condition(rng, t), _condition(rng, t)
    word = rng.choice(("and", "or"))
    return f"Which {t.plural} are those {said_1} {word} {said_2}?", f"SELECT name FROM {t.name} WHERE {where_1} {word.upper()} {where_2}"


def _ask_count(rng: random.Random, t: _Table) -> tuple[str, str]:
    said, where = _condition(rng, t)
    question = rng.choice(
        (f"How many {t.plural} are there {said}?", f"Count the {t.plural} {said}.", f"What is the number of {t.plural} {said}?")
    )
    return question, f"SELECT COUNT(*) FROM {t.name} WHERE {where}"


def _ask_aggregate(rng: random.Random, t: _Table) -> tuple[str, str]:
    name = rng.choice(t.numbers)
    said, function = rng.choice((("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM")))
    question, query = f"What is the {said} {_say(name)} of {t.plural}", f"SELECT {function}({name}) FROM {t.name}"
    if rng.random() < 0.5:
        said, where = _condition(rng, t)
        question, query = f"{question} {said}", f"{query} WHERE {where}"
    return question + "?", query


def _ask_top(rng: random.Random, t: _Table) -> tuple[str, str]:
    name, count = rng.choice(t.numbers), rng.randint(1, 10)
    said, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    if count == 1:
        return f"Which {t.label} has the {said} {_say(name)}?", f"SELECT name FROM {t.name} ORDER BY {name} {order} LIMIT 1"
    return (
        f"Show the {count} {t.plural} with the {said} {_say(name)}.",
        f"SELECT name, {name} FROM {t.name} ORDER BY {name} {order} LIMIT {count}",
    )


def _ask_groups(rng: random.Random, t: _Table) -> tuple[str, str]:
    word = rng.choice(t.words)
    if rng.random() < 0.5:
        return f"How many {t.plural} are there for each {_say(word)}?", f"SELECT {word}, COUNT(*) FROM {t.name} GROUP BY {word}"
    name = rng.choice(t.numbers)
    question = f"For each {_say(word)}, what is the average {_say(name)} of {t.plural}?"
    return question, f"SELECT {word}, AVG({name}) FROM {t.name} GROUP BY {word} ORDER BY AVG({name}) DESC"


def _ask_having(rng: random.Random, t: _Table) -> tuple[str, str]:
    word, count = rng.choice(t.words), rng.randint(2, 5)
    question = f"Which {_say(word)} values are shared by at least {count} {t.plural}?"
    return question, f"SELECT {word} FROM {t.name} GROUP BY {word} HAVING COUNT(*) >= {count}"


def _ask_above(rng: random.Random, t: _Table) -> tuple[str, str]:
    name = rng.choice(t.numbers)
    said, sign = rng.choice((("above", ">"), ("below", "<")))
    return (
        f"Find the {t.plural} whose {_say(name)} is {said} the average.",
        f"SELECT name FROM {t.name} WHERE {name} {sign} (SELECT AVG({name}) FROM {t.name})",
    )


def _ask_distinct(rng: random.Random, t: _Table) -> tuple[str, str]:
    word = rng.choice(t.words)
    return f"What are the different {_say(word)} values of {t.plural}?", f"SELECT DISTINCT {word} FROM {t.name} ORDER BY {word}"


def _join(t: _Table) -> str:
    parent = _parent(t)
    return f"{t.name} AS a JOIN {parent.name} AS b ON a.{parent.name}_id = b.id"


def _parent(t: _Table) -> _Table:
    assert t.parent is not None  # join questions are asked of linked tables only
    return t.parent


def _ask_join_list(rng: random.Random, t: _Table) -> tuple[str, str]:
    said, where = _condition(rng, _parent(t), "b.")
    return f"List the names of {t.plural} of {_parent(t).plural} {said}.", f"SELECT a.name FROM {_join(t)} WHERE {where}"


def _ask_join_count(rng: random.Random, t: _Table) -> tuple[str, str]:
    parent = _parent(t)
    if rng.random() < 0.5:
        return f"How many {t.plural} does each {parent.label} have?", f"SELECT b.name, COUNT(*) FROM {_join(t)} GROUP BY b.id"
    question = f"Which {parent.label} has the most {t.plural}?"
    return question, f"SELECT b.name FROM {_join(t)} GROUP BY b.id ORDER BY COUNT(*) DESC LIMIT 1"


def _ask_join_aggregate(rng: random.Random, t: _Table) -> tuple[str, str]:
    parent, name = _parent(t), rng.choice(t.numbers)
    said, function = rng.choice((("average", "AVG"), ("highest", "MAX"), ("total", "SUM")))
    said_where, where = _condition(rng, parent, "b.")
    question = f"What is the {said} {_say(name)} of {t.plural} for {parent.plural} {said_where}?"
    return question, f"SELECT {function}(a.{name}) FROM {_join(t)} WHERE {where}"


def _ask_join_both(rng: random.Random, t: _Table) -> tuple[str, str]:
    said, where = _condition(rng, t, "a.")
    word = rng.choice(_parent(t).words)
    question = f"Show the name of each {t.label} {said} and the {_say(word)} of its {_parent(t).label}."
    return question, f"SELECT a.name, b.{word} FROM {_join(t)} WHERE {where}"


def _ask_without(rng: random.Random, t: _Table) -> tuple[str, str]:
    parent = _parent(t)
    return (
        f"Which {parent.plural} have no {t.plural}?",
        f"SELECT name FROM {parent.name} WHERE id NOT IN (SELECT {parent.name}_id FROM {t.name})",
    )


_Ask = Callable[[random.Random, _Table], tuple[str, str]]
_SINGLES: tuple[_Ask, ...] = (
    _ask_list, _ask_list, _ask_two, _ask_count, _ask_aggregate, _ask_top, _ask_groups, _ask_having, _ask_above, _ask_distinct
)  # fmt: skip
_JOINS: tuple[_Ask, ...] = (_ask_join_list, _ask_join_count, _ask_join_aggregate, _ask_join_both, _ask_without)
