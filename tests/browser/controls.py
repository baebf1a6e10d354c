"""The controls of a widget, moved as a learner moves them, and the picture that must follow."""

from collections.abc import Callable

from playwright.sync_api import Locator, Page, TimeoutError

REDRAWN_SECONDS = 60
CONTROLS = ".noUi-handle, select, input[type=checkbox]"
# What the widget shows below its controls: a picture with its words, or why there is none.
SHOWN = """box => {
    const shown = box.querySelector('.widget-html-content');
    const image = shown.querySelector('img');
    return image ? {picture: image.src, words: image.alt} : {picture: '', words: shown.innerText};
}"""
DIFFERS = f"([box, before]) => ({SHOWN})(box).words !== before"
SAME = DIFFERS.replace("!==", "===")


class Explorer:
    """A box of controls above a picture.

    Args:
        page: Where it stands.
        box: The widget.
    """

    def __init__(self, page: Page, box: Locator):
        self.page, self.box = page, box
        self.controls = box.locator(CONTROLS)

    def shown(self) -> dict[str, str]:
        """The picture and its alt text, as they are now."""
        return self.box.evaluate(SHOWN)

    def complaints(self) -> list[str]:
        """Move each control by a step and back, by keyboard, then by mouse; what does not follow.

        A step from the defaults: elsewhere a lever may rightly change nothing.
        """
        self.box.scroll_into_view_if_needed()
        names = [self._name(number) for number in range(self.controls.count())]
        if not names:
            return ["it has no controls"]
        found = []
        self.controls.first.focus()
        for number, name in enumerate(names):
            if number and not self._tab_to(number):
                found.append(f"{name} is not reached with Tab")
                self.controls.nth(number).focus()
            found += self._follows(f"{name}, by keyboard", number, self._press)
        for number, name in enumerate(names):
            found += self._follows(f"{name}, by mouse", number, self._drag)
        return found

    def _name(self, number: int) -> str:
        return self.controls.nth(number).evaluate(
            "e => e.closest('.widget-inline-hbox, .widget-checkbox').innerText.split('\\n')[0]"
        )

    def _follows(self, what: str, number: int, move: Callable[[int, int], None]) -> list[str]:
        way = self._way(number)
        before = self.shown()
        move(number, way)
        if not self._becomes(DIFFERS, before["words"]):
            return [f"{what}: the words stay {before['words']!r}"]
        stays = self.shown()["picture"] == before["picture"]
        move(number, -way)
        returns = self._becomes(SAME, before["words"])
        return [f"{what}: the picture stays"] * stays + [f"{what}: no way back"] * (not returns)

    def _becomes(self, condition: str, words: str) -> bool:
        argument = [self.box.element_handle(), words]
        try:
            self.page.wait_for_function(condition, arg=argument, timeout=1000 * REDRAWN_SECONDS)
        except TimeoutError:
            return False
        return True

    def _way(self, number: int) -> int:
        """1 to move up, -1 for a slider that is at its end."""
        control = self.controls.nth(number)
        if control.get_attribute("role") != "slider":
            return 1
        now, most = (float(control.get_attribute(f"aria-value{n}")) for n in ("now", "max"))
        return 1 if now < most else -1

    def _tab_to(self, number: int) -> bool:
        """Tab from the control before it, past that one's readout."""
        for _ in range(2):
            self.page.keyboard.press("Tab")
            if self.controls.nth(number).evaluate("e => e === document.activeElement"):
                return True
        return False

    def _press(self, number: int, way: int) -> None:
        control = self.controls.nth(number)
        if control.get_attribute("type") == "checkbox":
            self.page.keyboard.press("Space")
        elif control.get_attribute("role") == "slider":
            self.page.keyboard.press("ArrowRight" if way > 0 else "ArrowLeft")
        else:
            self.page.keyboard.press("ArrowDown" if way > 0 else "ArrowUp")

    def _drag(self, number: int, way: int) -> None:
        control = self.controls.nth(number)
        if control.get_attribute("type") == "checkbox":
            control.click()
        elif control.get_attribute("role") == "slider":
            now, least, most = (float(control.get_attribute(f"aria-value{name}"))
                                for name in ("now", "min", "max"))  # fmt: skip
            control.hover()
            track = self.box.locator(".noUi-base").nth(self._slider(number)).bounding_box()
            step = track["width"] / (most - least)
            self.page.mouse.down()
            self.page.mouse.move(track["x"] + step * (now + way - least),
                                 track["y"] + track["height"] / 2, steps=5)  # fmt: skip
            self.page.mouse.up()
        else:  # a headless browser draws no menu that could be clicked
            control.select_option(index=max(way, 0))

    def _slider(self, number: int) -> int:
        roles = self.controls.evaluate_all("all => all.map(e => e.getAttribute('role'))")
        return roles[:number].count("slider")
