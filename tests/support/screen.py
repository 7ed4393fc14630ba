"""A terminal's screen: the text that a person reads after a program has written to it."""

import re

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    """Lines of a terminal of some width that has never to scroll."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._lines = [""]
        self._row = self._column = 0

    @property
    def lines(self) -> list[str]:
        """The lines of the screen, without blanks at their ends."""
        return [line.rstrip() for line in self._lines]

    def write(self, text: str) -> None:
        """Write text with control sequences, as far as rich uses them."""
        position = 0
        while position < len(text):
            found = SEQUENCE.match(text, position)
            if found:
                self._control(*found.groups())
                position = found.end()
            else:
                self._put(text[position])
                position += 1

    def _control(self, argument: str, kind: str) -> None:
        if kind == "A":
            self._row -= int(argument or 1)
            assert self._row >= 0, "above the first line"
        elif kind == "K":
            assert argument == "2", argument
            self._lines[self._row] = ""
        else:
            # Colours, and hiding or showing the cursor.
            assert kind == "m" or argument == "?25", (argument, kind)

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._move_down()
        else:
            assert character.isprintable(), repr(character)
            if self._column == self._columns:
                self._column = 0
                self._move_down()
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1

    def _move_down(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append("")
