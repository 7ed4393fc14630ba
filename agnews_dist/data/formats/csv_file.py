"""Strict csv and tsv (RFC 4180): a record that two programs could read differently is an error, never a guess.

pandas, pyarrow and Python's csv module accept a stray quote and then swallow or change rows in silence. Backslash escapes and
other separators are recognised, and said. Where two dialects fit a file and give other texts, it is refused.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np

from agnews_dist.data.formats.streams import MAX_LINE, read_lines
from agnews_dist.data.formats.table import CHUNK_ROWS, LABEL_NAMES, TEXT_NAMES, Chunk, Table, check_unique
from agnews_dist.errors import DataError, quote

ORIGINAL_COLUMNS = ("class", "title", "description")
"""Columns of AG News' original csv, which has no header."""
Record = tuple[int, list[str], int]
"""(line number, fields, number of lines after the first)."""
_USUAL_NAMES = (*chain.from_iterable(TEXT_NAMES), *LABEL_NAMES)
"""Fields of a first line that are not a text: its first field may be the number of pandas' index."""
_INTEGER = re.compile(r"[+-]?[0-9]+")
_SAID_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""The first line by which Excel is given the separator."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_ADVICE = "Put texts with {separators}, quotes or line breaks in double quotes, and double every quote inside."
_COUNT_ADVICE = "Name every column in the first line, and put texts with {separators} in double quotes."
_RETURN_ADVICE = "Put texts with line breaks in double quotes, and end lines with line feeds, as by mac2unix."


class Fault(Exception):  # noqa: N818 (becomes a DataError once no dialect fits)
    """A record that the dialect does not allow; the message says where and why."""

    def __init__(self, message: str, advice: str = _ADVICE) -> None:
        super().__init__(message)
        self.advice = advice


@dataclass(frozen=True)
class Dialect:
    """The separator of fields, and the protection of characters in them."""

    separator: str
    has_quotes: bool = True
    """False: quotes are ordinary characters."""
    has_escapes: bool = False
    """True: a backslash before a quote, a separator, a line break or a backslash protects it."""

    @cached_property
    def quoted(self) -> re.Pattern[str]:
        """Pattern of a quoted field."""
        if self.has_escapes:
            return re.compile(r'"([^"\\]*(?:(?:\\.|"")[^"\\]*)*)"(?!")', re.DOTALL)
        return re.compile(r'"([^"]*(?:""[^"]*)*)"(?!")')

    @cached_property
    def end_of_quoted(self) -> re.Pattern[str]:
        """Pattern of the end of a quoted field, from the start of a line inside it."""
        return re.compile(self.quoted.pattern.removeprefix('"'), re.DOTALL)

    @cached_property
    def unquoted(self) -> re.Pattern[str]:
        """Pattern of a field without quotes."""
        plain = rf"[^{re.escape(self.separator)}\r\n\\]" if self.has_escapes else rf"[^{re.escape(self.separator)}\r\n]"
        return re.compile(rf"((?:{plain}|\\[^\r])*)" if self.has_escapes else rf"({plain}*)", re.DOTALL)

    @cached_property
    def stray_quote(self) -> re.Pattern[str]:
        """Pattern of a quote that no field without quotes may hold; with escapes, one that is not protected."""
        return re.compile(r'(?:^|[^\\])(?:\\\\)*"' if self.has_escapes else "(?!)")

    @cached_property
    def _escape(self) -> re.Pattern[str]:
        return re.compile(rf'\\(["\\\r\n{re.escape(self.separator)}])|"(")', re.DOTALL)

    def unprotect(self, field: str, *, is_quoted: bool) -> str:
        """Return the text of a field."""
        if self.has_escapes:
            return self._escape.sub(lambda match: match[1] or match[2], field)
        return field.replace('""', '"') if is_quoted else field


class CsvTable(Table):
    """A csv or tsv file with a header, or AG News' original columns without one."""

    def __init__(self, path: Path, name: str, separator: str | None = None) -> None:
        """Find the dialect and the columns; `separator`: None: the one of the first line."""
        self._path, self.name = path, name
        self.suspects: list[tuple[int, list[str]]] = []
        """(row, fields) of lines inside a field that look like rows: two stray quotes turn rows between them into one text."""
        first = next(read_lines(path, name), "")
        said = _SAID_SEPARATOR.fullmatch(first)
        self._has_separator_line = said is not None and said[1] in _SEPARATORS
        if said is not None and self._has_separator_line:
            separator = said[1]
            first = next(islice(read_lines(path, name), 1, None), "")
        if not first.strip():
            if not any(line.strip() for line in self._lines()):
                raise DataError(f"{name} is empty: at least one row is needed. Check how it was written, or remove it.")
            raise DataError(f"{name} line 1 is blank: it must name the columns. Remove the blank lines before the header.")
        self.dialect = Dialect(separator or _guess_separator(first))
        try:
            self.dialect = self._find_dialect()
            _, header, _ = next(self._records(self.dialect))
        except Fault as fault:
            raise self._refuse(fault) from fault
        if any(re.fullmatch(r"\s*'.*'\s*", field) for field in header):
            raise self._refuse(Fault("line 1: its fields are in single quotes"))
        are_integers = [_INTEGER.fullmatch(field) is not None for field in header]
        is_original = len(header) == len(ORIGINAL_COLUMNS) and are_integers[0] and not all(are_integers)
        self.has_header = not is_original or any(field.strip().lower() in _USUAL_NAMES for field in header)
        self.columns = tuple(header) if self.has_header else ORIGINAL_COLUMNS
        if separator is None and self.dialect.separator != ",":
            self.note = f"fields are separated by {_SEPARATORS[self.dialect.separator]}"
        if self.dialect.has_escapes:
            self.note = "; ".join(filter(None, (self.note, "a backslash protects quotes and separators")))
        elif not self.dialect.has_quotes:
            self.note = "; ".join(filter(None, (self.note, "quotes are ordinary characters")))

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield the rows as unchanged strings: `NA` stays a text, and `007` keeps its zeros."""
        check_unique(self.name, self.columns, wanted)
        indices = [self.columns.index(column) for column in wanted]
        header = [column.strip() for column in self.columns] if self.has_header and len(self.columns) > 1 else []
        values: list[list[object]] = [[] for _ in indices]
        num_rows, start = 0, 1
        try:
            records = self._records(self.dialect)
            if self.has_header:
                next(records)
            for line, fields, num_more in records:
                is_alike = header and fields[-1].strip() == header[-1]
                if is_alike and [field.strip().lstrip("\ufeff") for field in fields] == header:
                    raise DataError(
                        f"{self.name} line {line} repeats the header: files were probably joined. Remove the line, or give the "
                        "files in a directory."
                    )
                for column, index in zip(values, indices, strict=True):
                    column.append(fields[index])
                num_rows += 1
                if num_more:
                    self.suspects += [(num_rows, each) for field in fields for each in self._find_rows(field)]
                if num_rows % CHUNK_ROWS == 0:
                    yield Chunk(dict(zip(wanted, values, strict=True)), np.arange(start, num_rows + 1, dtype=np.int32))
                    values, start = [[] for _ in indices], num_rows + 1
        except Fault as fault:
            raise self._refuse(fault) from fault
        yield Chunk(dict(zip(wanted, values, strict=True)), np.arange(start, num_rows + 1, dtype=np.int32))

    def _find_rows(self, field: str) -> Iterator[list[str]]:
        """Yield the fields of each line in a field, but for the last line, that has as many of them as a row."""
        for line in field.split("\n")[:-1]:
            fields = line.removesuffix("\r").split(self.dialect.separator)
            if len(fields) == len(self.columns):
                yield [each.strip('"') for each in fields]

    def _lines(self) -> Iterator[str]:
        """Yield the lines; the one in which Excel names the separator is blank."""
        lines = read_lines(self._path, self.name)
        if self._has_separator_line:
            next(lines)
            yield "\n"
        yield from lines

    def _refuse(self, fault: Fault) -> DataError:
        separators = _SEPARATORS[self.dialect.separator]
        return DataError(f"{self.name} {fault}: rows could be lost or changed. {fault.advice.format(separators=separators)}")

    def _records(self, dialect: Dialect) -> Iterator[Record]:
        """Yield each record, the header included; all have equally many fields."""
        num_fields = 0
        for line, fields, num_more in _parse(self._lines(), dialect):
            num_fields = num_fields or len(fields)
            if len(fields) != num_fields:
                found = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
                raise Fault(f"line {line} has {found}, and the first line {num_fields}", _COUNT_ADVICE)
            yield line, fields, num_more

    def _find_dialect(self) -> Dialect:
        """Return the only dialect that fits the file.

        Raises:
            Fault: none fits, or two do and give other texts.
        """
        first = self.dialect
        has_quotes, has_backslashes, single = False, False, 0
        for number, line in enumerate(self._lines(), start=1):
            has_quotes, has_backslashes = has_quotes or '"' in line, has_backslashes or "\\" in line
            if has_quotes and has_backslashes:
                break
            single = single or number * ("\\'" in line)
        if single and not has_quotes:
            raise Fault(f"line {single} has a backslash that may protect the single quote behind it, or be part of the text")
        if has_backslashes:
            escaped = replace(first, has_escapes=True)
            fault, other = self._try(first), self._try(escaped)
            single, pair = self._find_backslashes()
            if fault is not None and other is None and not (single and pair):
                return escaped
            if fault is None and pair and not single:
                raise Fault(f"line {pair} has a backslash that may protect the next one, or be part of the text")
            if fault is None and other is None and not single:
                self._compare(first, escaped)
        if first.separator == "\t" and has_quotes and self._try(first) is not None:
            plain = replace(first, has_quotes=False)
            if self._try(plain) is None and not any(
                len(field) > 1 and field[0] == field[-1] == '"' for _, fields, _ in self._records(plain) for field in fields
            ):
                return plain
        return first

    def _try(self, dialect: Dialect) -> Fault | None:
        try:
            for _ in self._records(dialect):
                pass
        except Fault as fault:
            return fault
        return None

    def _find_backslashes(self) -> tuple[int, int]:
        """Return the first lines where a backslash protects nothing, and where one may protect another; 0: nowhere."""
        protected = re.compile(rf'\\(["\\\r\n{re.escape(self.dialect.separator)}])?')
        single = pair = 0
        for number, line in enumerate(self._lines(), start=1):
            for match in protected.finditer(line) if "\\" in line else ():
                single = single or number * (match[1] is None)
                pair = pair or number * (match[1] == "\\")
        return single, pair

    def _compare(self, one: Dialect, other: Dialect) -> None:
        """Raise a Fault if two dialects give other texts."""
        for first, second in zip_longest(self._records(one), self._records(other)):
            if first is None or second is None or first[1] != second[1]:
                line = first[0] if first else "?"
                raise Fault(f"line {line} has a backslash that may protect the next character, or be part of the text")


def _guess_separator(first: str) -> str:
    """Return the separator of the first line: a comma, unless it has none and another one."""
    counts = {separator: len(re.findall(re.escape(separator), re.sub(r'"[^"]*"', "", first))) for separator in _SEPARATORS}
    return "," if counts[","] else max(counts, key=lambda separator: counts[separator])


def _parse(lines: Iterator[str], dialect: Dialect) -> Iterator[Record]:
    """Yield each record. Blank lines between records are left out."""
    separator, number = dialect.separator, 0
    single_quoted = re.compile(rf"(?:^|{re.escape(separator)})'[^']*(?:''[^']*)+'(?:{re.escape(separator)}|\r?$)")
    lines = iter(lines)
    for line in lines:
        number += 1
        if line.startswith('"') and dialect.has_quotes and (fields := _split_quoted(line, dialect)):
            yield number, fields, 0
            continue
        if (dialect.has_quotes and '"' in line) or (dialect.has_escapes and "\\" in line):
            fields, num_more = _parse_protected(line, lines, dialect, number)
            yield number, fields, num_more
            number += num_more
            continue
        text = line.removesuffix("\r\n").removesuffix("\n")
        if "\r" in text:
            raise Fault(f"line {number} has a carriage return outside of quotes", _RETURN_ADVICE)
        if "''" in text and dialect.has_quotes and single_quoted.search(text):
            raise Fault(f"line {number}: its fields are in single quotes")
        if text:
            yield number, text.split(separator), 0


def _split_quoted(line: str, dialect: Dialect) -> list[str]:
    """Split a line with quotes around all fields, and none inside; return no fields of another line."""
    text = line.rstrip("\r\n")
    fields = text[1:-1].split(f'"{dialect.separator}"')
    is_simple = text.endswith('"') and line.count('"') == 2 * len(fields) and not (dialect.has_escapes and "\\" in line)
    is_ended = len(line) - len(text) <= 1 + line.endswith("\r\n")
    return fields if is_simple and is_ended else []


def _parse_protected(line: str, lines: Iterator[str], dialect: Dialect, number: int) -> tuple[list[str], int]:
    """Parse a record with quotes or escapes, which may take more lines; return its fields, and how many lines more."""
    separator, record, num_more = dialect.separator, line, 0
    quoted, unquoted = dialect.quoted, dialect.unquoted
    fields: list[str] = []
    position = 0
    while True:
        is_quoted = dialect.has_quotes and record.startswith('"', position)
        match = (quoted if is_quoted else unquoted).match(record, position)
        if match is None:
            # Every line ends outside of a pair of quotes, so the next ones are searched for the end alone.
            opened = record[position + 1 :]
            pieces, record, num_read = _read_until_quote(lines, dialect)
            if not record:
                raise Fault(f"line {number}: the quote that begins field {len(fields) + 1} is not closed")
            num_more += num_read
            match = dialect.end_of_quoted.match(record)
            assert match is not None
            field, position = f"{opened}{pieces}{match[1]}", match.end()
        elif not is_quoted and match.end() == len(record) and record.endswith("\\\n"):
            more = next(lines, "")
            if not more:
                raise Fault(f"line {number} ends in a backslash")
            record, num_more = record + more, num_more + 1
            continue
        else:
            field, position = match[1], match.end()
        if not is_quoted and '"' in field and (dialect.stray_quote.search(field) or field.lstrip().startswith('"')):
            raise Fault(f"line {number}: a quote does not begin field {len(fields) + 1}, {quote(field[:40])}")
        if not is_quoted and len(field) > 1 and field[0] == field[-1] == "'" and (dialect.has_escapes or "''" in field[1:-1]):
            raise Fault(f"line {number}: its fields are in single quotes")
        fields.append(dialect.unprotect(field, is_quoted=is_quoted))
        if record.startswith(separator, position):
            position += 1
        elif record[position:] in ("\n", "\r\n", ""):
            return fields, num_more
        elif not is_quoted:
            raise Fault(f"line {number} has a carriage return outside of quotes", _RETURN_ADVICE)
        else:
            where = f", closed in line {number + num_more}," if num_more else ""
            following = quote(record[position : position + 20].rstrip("\r\n"))
            raise Fault(f"line {number}: the quoted field {len(fields)}{where} is followed by {following}, not by a separator")


def _read_until_quote(lines: Iterator[str], dialect: Dialect) -> tuple[str, str, int]:
    """Return (lines inside the quotes, the line where they end or "", number of all these lines)."""
    inside: list[str] = []
    size = 0
    for line in lines:
        if dialect.end_of_quoted.match(line):
            return "".join(inside), line, len(inside) + 1
        inside.append(line)
        size += len(line)
        if size > MAX_LINE:
            break
    return "", "", 0
