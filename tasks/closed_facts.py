"""A small closed set of facts about countries: what the factual task asks where no file is given."""

# country, capital, language, continent
_COUNTRIES = (
    ("France", "Paris", "French", "Europe"),
    ("Italy", "Rome", "Italian", "Europe"),
    ("Germany", "Berlin", "German", "Europe"),
    ("Spain", "Madrid", "Spanish", "Europe"),
    ("Portugal", "Lisbon", "Portuguese", "Europe"),
    ("Greece", "Athens", "Greek", "Europe"),
    ("Poland", "Warsaw", "Polish", "Europe"),
    ("Sweden", "Stockholm", "Swedish", "Europe"),
    ("Norway", "Oslo", "Norwegian", "Europe"),
    ("Hungary", "Budapest", "Hungarian", "Europe"),
    ("Japan", "Tokyo", "Japanese", "Asia"),
    ("China", "Beijing", "Chinese", "Asia"),
    ("Thailand", "Bangkok", "Thai", "Asia"),
    ("Vietnam", "Hanoi", "Vietnamese", "Asia"),
    ("Turkey", "Ankara", "Turkish", "Asia"),
    ("Iran", "Tehran", "Persian", "Asia"),
    ("Egypt", "Cairo", "Arabic", "Africa"),
    ("Kenya", "Nairobi", "Swahili", "Africa"),
    ("Ghana", "Accra", "English", "Africa"),
    ("Senegal", "Dakar", "French", "Africa"),
    ("Peru", "Lima", "Spanish", "America"),
    ("Brazil", "Brasilia", "Portuguese", "America"),
    ("Cuba", "Havana", "Spanish", "America"),
    ("Canada", "Ottawa", "English", "America"),
)

# relation -> template; [X] is the subject, and the object follows.
CLOSED_RELATIONS = {
    "capital": "The capital of [X] is",
    "language": "The language of [X] is",
    "continent": "The continent of [X] is",
}

# subject, relation, object
CLOSED_FACTS: tuple[tuple[str, str, str], ...] = tuple(
    (country, relation, answer)
    for country, *answers in _COUNTRIES
    for relation, answer in zip(CLOSED_RELATIONS, answers, strict=True)
)
