"""Patterns of the values of the E2E data in texts (Novikova, Dušek and Rieser 2017), on lowercase ASCII letters.

Prices and ratings have three levels: "cheap" and "less than £20" are the same level, so a text may say either. Patterns
are tried in order, and text recognised by one is not read by the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMES = (
    *("alimentum", "aromi", "bibimbap house", "blue spice", "browns cambridge", "clowns", "cocum", "cotto"),
    *("fitzbillies", "giraffe", "green man", "loch fyne", "midsummer house", "strada", "taste of cambridge"),
    *("the cambridge blue", "the cricketers", "the dumpling tree", "the eagle", "the golden curry"),
    *("the golden palace", "the mill", "the olive grove", "the phoenix", "the plough", "the punter", "the rice boat"),
    *("the twenty two", "the vaults", "the waterman", "the wrestlers", "travellers rest beefeater", "wildwood"),
    *("zizzi", "all bar one", "avalon", "burger king", "cafe adriatic", "cafe brazil", "cafe rouge", "cafe sicilia"),
    *("clare hall", "crowne plaza hotel", "express by holiday inn", "rainbow vegetarian cafe", "raja indian cuisine"),
    *("ranch", "the bakers", "the portland arms", "the six bells", "the sorrento", "yippee noodle bar"),
)
"""Names of places in the E2E data, described ones and neighbours."""

SUBJECTS = frozenset({"eatType"})
"""Slots whose value may be repeated, since it is the subject of sentences."""

RESTAURANT = "restaurant"
OTHER = "another"
"""A value that no record has: Thai food, four stars."""

GENERIC = frozenset({RESTAURANT})
"""Values that apply to any place: a pub is also called a restaurant."""

LEVELS = {
    "priceRange": {
        "cheap": "low",
        "less than £20": "low",
        "moderate": "middle",
        "£20-25": "middle",
        "high": "high",
        "more than £30": "high",
    },
    "customer rating": {
        "1 out of 5": "low",
        "low": "low",
        "3 out of 5": "middle",
        "average": "middle",
        "5 out of 5": "high",
        "high": "high",
    },
}
LOW, MIDDLE, HIGH = "low", "middle", "high"

_FAMILY = r"(?:famil(?:y|ies)|kids?|kiddos|child(?:s|ren|rens)?|all ages?|youngsters|toddlers|little ones)"
_WORDS = r"(?:[ -]+(?!but\b)[\w']+)"
_PRICE = r"(?:pric(?:e|es|ed|ing)|costs?|costing)(?: and (?:customer )?rat(?:ings?|ed))?"
_RATING = (
    r"(?:rat(?:e|es|ed|ings?)|review(?:s|ed)?|satisfaction|feedback|reputation|scores?|scored|recommended|regarded|"
    r"acclaimed)(?: and pric(?:es?|ed))?"
)
_AVERAGE = r"(?:\baverage (?:\w+ )?(?:rat\w+|scores?|prices?)(?: \w+){0,4}? )?"
"""Start of "an average rating of 5 out of 5", which says one value."""
_OF_FIVE = r"(?:stars?\b|(?:[op]ut of|out|of) (?:a (?:possible )?)?(?:5|five)\b|/ ?5\b)"
_CENTRE = r"(?:city|town)[ -]?cent(?:re|er)\b"
_POUND, _TWENTY, _THIRTY = "(?:£ ?|gbp ?)?", "(?:20|twenty)", "(?:30|thirty)"
_NOT = r"(?:\bnot|n't)"


def level(slot: str, value: str) -> str:
    """Return the level of a price or a rating, and the value itself of another slot, in lowercase."""
    return LEVELS.get(slot, {}).get(value.lower(), value.lower())


def _graded(noun: str, other: str, adjectives: str) -> str:
    """Return a pattern for an adjective before or after its noun, where the other noun is not nearer."""
    before = rf"\b(?:{adjectives})(?:[ -]+(?!{other}|and\b|but\b)\w+){{0,2}}[ -]+{noun}\b"
    after = (
        rf"\b{noun}(?:[ -]+(?!{other}|and\b|but\b|with\b)\w+){{0,4}}[ -:]+(?:{adjectives})\b"
        rf"(?![ -]+(?:(?!and\b|but\b|with\b)\w+[ -]+)?{other})"
    )
    return f"{before}|{after}"


def _price(adjectives: str) -> str:
    return _graded(_PRICE, r"(?:rat(?:e|ing)|review|custom)", adjectives)


def _rating(adjectives: str) -> str:
    return _graded(_RATING, r"(?:pric|cost)", adjectives)


Patterns = tuple[tuple[frozenset[str], re.Pattern[str]], ...]


def _patterns(*rows: tuple[str | Sequence[str], *tuple[str, ...]]) -> Patterns:
    """Compile the rows of a slot: the values that a mention may mean (none where it says nothing), and its patterns."""
    return tuple(
        (frozenset((values,) if isinstance(values, str) else values), re.compile("|".join(patterns)))
        for values, *patterns in rows
    )


SLOTS = {
    "eatType": _patterns(
        ("coffee shop", r"\bcoffee[ -]?(?:shop|house|bar|place|store)s?\b", r"\bcafes?\b"),
        ("pub", r"\bpubs?\b"),
        (RESTAURANT, r"\brestaurants?\b"),
    ),
    "food": _patterns(
        ("fast food", r"\bfast[ -]?foods?\b", r"\bburgers?\b", r"\bfries\b"),
        ("chinese", r"\bchinese\b"),
        ("english", r"\benglish\b", r"\bbritish\b"),
        ("french", r"\bfrench\b"),
        ("indian", r"\bindian\b"),
        ("italian", r"\bitalian\b", r"\bpastas?\b", r"\bspaghetti\b"),
        ("japanese", r"\bjapanese\b", r"\bsushi\b"),
        (OTHER, r"\b(?:mexican|thai|greek|spanish|korean|vietnamese|turkish|german|american|mediterranean)\b"),
    ),
    "area": _patterns(
        ((), rf"\b(?:north|south|east|west|outside|outskirts)\w*(?: \w+){{0,2}} {_CENTRE}"),
        (
            "city centre",
            rf"\b{_CENTRE}",
            r"\b(?:cent(?:re|er)|heart|middle) of (?:the )?(?:city|town)\b",
            r"\bin the cent(?:re|er)\b",
            r"\bdowntown\b",
            r"\bcent(?:re|er) city\b",
        ),
        ("riverside", r"\briver[ -]?(?:side|bank|front)?s?\b"),
    ),
    "familyFriendly": _patterns(
        (
            "no",
            rf"(?:\b(?:not?|non|never|without|nor|neither|isnt|doesnt|unsuitable|avoid\w*|leav\w+)|n't){_WORDS}{{0,5}}?"
            rf"[ -]+{_FAMILY}\b(?:[ -]+(?:friendly|orien\w+))?(?: (?:with|and|or) {_FAMILY}\b)?",
            rf"\b{_FAMILY}[ -]+(?:friendly[ -]+)?(?:not|unfriendly|no|free)\b",
            rf"\b{_FAMILY} (?:are|is|were|should|may|can|would)[ -]?(?:not\b|n't|banned\b|prohibited\b)",
        ),
        ("yes", rf"\badults? (?:and|or) {_FAMILY}\b", rf"\b{_FAMILY} (?:and|or) adults?\b"),
        ("no", r"\badults?\b", r"\bgrown[ -]?ups?\b", r"\bover 18", r"\b18\+"),
        ("yes", rf"\b{_FAMILY}\b(?:[ -]+(?:friendly|orien\w+))?"),
    ),
    "priceRange": _patterns(
        (
            LOW,
            rf"{_AVERAGE}\b(?:less th[ae][nt]|under|below|up to|cheaper th[ae]n)(?: an?)?(?: price of)? {_POUND}"
            rf"{_TWENTY}(?: ?(?:gbp|pounds?|euros?))?\b",
            rf"\b{_TWENTY}(?: ?£| pounds?)? (?:or|and) (?:less|under|below)\b",
        ),
        (MIDDLE, rf"{_AVERAGE}(?:£ ?|\b){_TWENTY}(?: ?£| pounds?)? ?(?:-|to|and) ?£? ?(?:25|twenty[ -]five)\b"),
        (
            HIGH,
            rf"{_AVERAGE}\b(?:more th[ae]n|over|above|at least|upwards? of|greater th[ae]n|exceed\w*) {_POUND}"
            rf"{_THIRTY}\b",
            rf"\b{_THIRTY}(?: ?£| pounds?)? ?(?:\+|(?:and|or) (?:up|more|over|above)\b)",
        ),
        ((MIDDLE, HIGH), rf"{_NOT}(?: \w+)? (?:cheap|inexpensive)\b"),
        ((LOW, MIDDLE), rf"{_NOT}(?: \w+)? expensive\b", r"\baffordabl[ey](?:[ -]pric\w+)?\b"),
        ((LOW, MIDDLE), r"\breasonabl[ey][ -]+pric\w+", r"\bpric\w+(?: \w+)? reasonabl[ey]\b"),
        (MIDDLE, r"\b(?:moderately|averagely|medium)[ -]+(?:cheap|inexpensive|expensive)\b"),
        (HIGH, _price("above[ -]average|high(?:er|ly|[ -]end)?|premium|expensive|upper|top")),
        (LOW, _price("below[ -]average|low(?:er|est|ly)?|cheap(?:er|ly)?|small|great|good|budget|bargain")),
        (
            MIDDLE,
            _price(
                "moderat(?:e|ely|ing)|mid(?:dle)?|average(?:ly)?|medium|fair(?:ly)?|decent(?:ly)?|ok(?:ay)?|standard"
            ),
        ),
        (LOW, r"\b(?:cheap|inexpensive)(?:ly)?\b", r"\bbudget\b"),
        (HIGH, r"\bexpensive\b", r"\bprice?y\b", r"\bcostly\b", r"\bhigh[ -]+end\b"),
        (MIDDLE, r"\bmid[ -]?(?:dle)?[ -]?(?:range|level)\b(?! (?:customer |rat))", r"\bmoderate (?:price )?range\b"),
    ),
    "customer rating": _patterns(
        (LOW, rf"{_AVERAGE}\b(?:1|one)[ -]*{_OF_FIVE}"),
        (MIDDLE, rf"{_AVERAGE}\b(?:3|three)[ -]*{_OF_FIVE}"),
        (HIGH, rf"{_AVERAGE}\b(?:5|five)[ -]*{_OF_FIVE}"),
        (OTHER, rf"{_AVERAGE}\b(?:2|two|4|four)[ -]*{_OF_FIVE}"),
        (LOW, rf"{_NOT}(?: \w+){{0,2}} (?:well|highly|good|great|high)(?:[ -]+\w+)?[ -]+{_RATING}\b"),
        (
            HIGH,
            _rating(
                "high(?:er|ly|est)?|excellent|great|outstanding|fantastic|top|exceptional|superb|perfect|amazing|best|"
                "very good"
            ),
        ),
        ((MIDDLE, HIGH), _rating("good|well|positive")),
        (LOW, _rating("low(?:er|est|ly)?|poor(?:ly)?|bad(?:ly)?|terrible|negative")),
        (MIDDLE, _rating("average(?:ly)?|moderate(?:ly)?|medium|mid(?:dle)?|decent(?:ly)?|okay|ok|mediocre|fair")),
    ),
}
"""The patterns of each slot, in the order in which they are tried."""
