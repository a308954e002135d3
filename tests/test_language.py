from colintern.statistics import survey
from colintern.statistics.survey import guess_languages

QUESTIONS = {
    "en": "What does the table say about the revenue of {}?",
    "fr": "Quel est le chiffre d'affaires de l'entreprise en {} ?",
    "es": "¿Cuáles fueron los ingresos de la empresa en {}?",
    "ar": "ما هو المبلغ الإجمالي في عام {}؟",
    "zh": "{}年的总收入是多少？",
}


def test_distinct_queries_are_counted_and_what_is_no_language_is_unknown():
    queries = [question.format(year) for question in QUESTIONS.values() for year in (2019, 2020, 2020)]
    assert guess_languages([*queries, "42", "x"]) == dict.fromkeys(QUESTIONS, 2) | {"unknown": 2}


def test_of_many_queries_evenly_spread_ones_are_looked_at(monkeypatch):
    monkeypatch.setattr(survey, "MAX_LANGUAGE_QUERIES", 40)
    queries = [question.format(year) for question in QUESTIONS.values() for year in range(1000, 1020)]
    found = guess_languages(queries)
    assert found == guess_languages(queries) and sum(found.values()) == 34, "every third of 100"
    assert set(found) == set(QUESTIONS)


def test_no_queries_have_no_language():
    assert guess_languages([]) == {}
