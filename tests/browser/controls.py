"""The controls of a widget, moved as a learner moves them, and the picture that must follow."""

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
        """Move every control with the keyboard, then with the mouse; say what does not follow."""
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
            found += self._follows(f"{name}, by keyboard", lambda n=number: self._press(n))
        for number, name in enumerate(names):
            found += self._follows(f"{name}, by mouse", lambda n=number: self._drag(n))
        return found

    def _name(self, number: int) -> str:
        return self.controls.nth(number).evaluate(
            "e => e.closest('.widget-inline-hbox, .widget-checkbox').innerText.split('\\n')[0]")

    def _follows(self, what: str, move) -> list[str]:
        before = self.shown()
        move()
        try:
            self.page.wait_for_function(DIFFERS, arg=[self.box.element_handle(), before["words"]],
                                        timeout=1000 * REDRAWN_SECONDS)  # fmt: skip
        except TimeoutError:
            return [f"{what}: the words stay {before['words']!r}"]
        after = self.shown()
        return [] if after["picture"] != before["picture"] else [f"{what}: the picture stays"]

    def _tab_to(self, number: int) -> bool:
        """Tab from the control before it, past that one's readout."""
        for _ in range(2):
            self.page.keyboard.press("Tab")
            if self.controls.nth(number).evaluate("e => e === document.activeElement"):
                return True
        return False

    def _press(self, number: int) -> None:
        control = self.controls.nth(number)
        if control.get_attribute("type") == "checkbox":
            self.page.keyboard.press("Space")
        elif control.get_attribute("role") == "slider":
            now, most = (float(control.get_attribute(f"aria-value{n}")) for n in ("now", "max"))
            self.page.keyboard.press("ArrowRight" if now < most else "ArrowLeft")
        else:
            self.page.keyboard.press("ArrowDown")

    def _drag(self, number: int) -> None:
        control = self.controls.nth(number)
        if control.get_attribute("type") == "checkbox":
            control.click()
        elif control.get_attribute("role") == "slider":
            now = float(control.get_attribute("aria-valuenow"))
            least = float(control.get_attribute("aria-valuemin"))
            control.scroll_into_view_if_needed()
            track = self.box.locator(".noUi-base").nth(self._slider(number)).bounding_box()
            end = track["x"] + (0 if now > least else track["width"])
            control.hover()
            self.page.mouse.down()
            self.page.mouse.move(end, track["y"] + track["height"] / 2, steps=5)
            self.page.mouse.up()
        else:  # a headless browser draws no menu that could be clicked
            control.select_option(index=0)

    def _slider(self, number: int) -> int:
        roles = self.controls.evaluate_all("all => all.map(e => e.getAttribute('role'))")
        return roles[:number].count("slider")
