"""Personal data and secrets replaced by placeholders: <EMAIL>, <IP_ADDRESS>, <PHONE>, <PAYMENT_CARD>, <IBAN>, ...

Only what checks out is replaced, since manuals and code are full of numbers: cards pass Luhn and bear a known prefix,
IBANs pass modulo 97, Chinese identity numbers their check sign; an address like 4.2.1.3 is a section or a version
before it is a host. E-mail addresses of example domains and addresses of private networks stay. Names of persons are
not looked for.
"""

import ipaddress
import re

from data_scripts.cleaning.corpus_blocks import DocumentEditor, kind_of

# Before the "@", at most 64 characters (RFC 5321), and the domain behind it. Applied at each "@", so linear.
LOCAL_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?\Z")
DOMAIN = re.compile(r"((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6})([A-Za-z]{2,12})(?![\w@-])")
GENERIC = set("com org net edu gov mil int info biz name pro aero coop museum mobi dev app io ai xyz online site tech "
              "cloud email page blog shop store club live me tv cc".split())
COUNTRIES = set("ac ad ae af ag al am ao ar at au az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cd ch "
                "ci cl cm cn co cr cu cv cy cz de dj dk dm do dz ec ee eg es et eu fi fj fo fr ga ge gh gi gl gm gn "
                "gr gt gy hk hn hr ht hu id ie il im in iq ir is it jm jo jp ke kg kh kr kw kz la lb li lk lr ls lt "
                "lu lv ly ma mc md mg mk ml mm mn mo mr mt mu mv mw mx my mz na ne ng ni nl no np nz om pa pe pg ph "
                "pk pl pr ps pt pw py qa ro rs ru rw sa sb sd se sg si sk sm sn so sr st su sv sy sz td tg th tj tl "
                "tm tn to tr tt tw tz ua ug uk us uy uz va vc ve vg vn vu ws ye za zm zw ".split())
EXAMPLES = re.compile(r"(?i)(?:^|\.)(?:example|test|localhost|invalid|domain|yourdomain|mydomain|company|foo|bar)\.")
NOBODY = {"git", "noreply", "no-reply", "user", "username", "me", "you", "name", "email", "foo", "bar", "someone",
          "root"}

# The patterns begin with a plain sign or class and look behind it afterwards: `re` finds such beginnings much faster.
IPV4 = re.compile(r"\d(?<![\w.-]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w-]|\.\d)")
IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9a-fA-F]{3}:(?:[0-9a-fA-F]{1,4}:){0,6}(?::?[0-9a-fA-F]{1,4}){1,6}(?![\w:])")
LIKE_A_VERSION = re.compile(r"(?i)(?:\bv|version|release|section|chapter|appendix|§|\boid|\brev(?:ision)?|\bver)"
                            r"[ .:=]*\Z")
LEAST_OCTET = 100  # 98 % of random addresses have a part that large; sections and versions hardly ever do

AFTER = r"(?![\w./-]*\d)"
PHONES = (re.compile(r"\+(?<![\w+./-]\+)[1-9]\d{0,2}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,4}){1,4}"
                     + AFTER),
          re.compile(r"\((?<![\w+./-]\()\d{3}\) ?\d{3}[-.]\d{4}" + AFTER),
          re.compile(r"\d(?<![\w+./-]\d)(?:-\d{3}|\d\d)-\d{3}-\d{4}" + AFTER))
PHONE_WORD = re.compile(r"(?i)(?:\b(?:phone|tel(?:ephone|efon)?|fax|mobile|call)\b|电话|手机|传真)[^\n]{0,12}\Z")
PLAIN_PHONES = (re.compile(r"\+(?<![\w+./-]\+)\d{8,15}" + AFTER),  # with a word beside them only
                re.compile(r"[01](?<![\w+./-][01])(?:[3-9]\d{9}|\d{2,3}-\d{7,8})" + AFTER))
CARD = re.compile(r"[2-6](?<![\w.-][2-6])(?:\d{3}([ -])\d{4}\1\d{4}\1\d{4}|[47]\d{2}([ -])\d{6}\2\d{5}|"
                  r"\d{12,18})(?![\w.-])")
CARD_PREFIX = re.compile(r"(?:4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|"
                         r"3[47]\d{13}|6(?:011|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17})\Z")
CARD_WORD = re.compile(r"(?i)\b(?:card|visa|mastercard|amex|american express|credit|debit|discover|卡号|信用卡)")
IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9][A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
IBAN_LENGTHS = {"AD": 24, "AE": 23, "AL": 28, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22,
                "DK": 18, "EE": 20, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22,
                "IL": 23, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18,
                "NO": 15, "PL": 28, "PT": 25, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "TR": 26,
                "UA": 29}
SSN = re.compile(r"[0-8](?<![\w.-][0-8])\d{2}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)")
SSN_WORD = re.compile(r"(?i)\b(?:ssn|social security)\b")
CHINESE_ID = re.compile(r"[1-8](?<![\w.][1-8])\d{5}(?:19|20)\d{2}"
                        r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![\w.])")

PRIVATE_KEY = re.compile(r"-----BEGIN ((?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?)-----"
                         r".{40,20000}?-----END \1-----", re.S)
TOKENS = {  # what a token begins with: what follows
    "AKIA": r"[0-9A-Z]{16}", "ASIA": r"[0-9A-Z]{16}", "github_pat_": r"[A-Za-z0-9_]{60,255}",
    **{f"gh{kind}_": r"[A-Za-z0-9]{36,255}" for kind in "pousr"}, "glpat-": r"[A-Za-z0-9_-]{20}",
    **{f"xox{kind}-": r"[A-Za-z0-9-]{10,250}" for kind in "abeprs"}, "sk_live_": r"[A-Za-z0-9]{20,250}",
    "rk_live_": r"[A-Za-z0-9]{20,250}", "sk-": r"(?:proj-|ant-)?[A-Za-z0-9_-]{32,250}", "AIza": r"[0-9A-Za-z_-]{35}",
    "hf_": r"[A-Za-z]{34}", "npm_": r"[A-Za-z0-9]{36}", "pypi-AgEI": r"[A-Za-z0-9_-]{50,250}",
    "eyJ": r"[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}"}
TOKENS = {sign: re.compile(rf"{sign}(?<![A-Za-z0-9_]{sign}){rest}(?![A-Za-z0-9_])") for sign, rest in TOKENS.items()}


def passes_luhn(digits):
    """Whether a string of digits passes the check of payment cards."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_iban(text):
    """Whether a text is an IBAN: its country's length, and remainder 1 modulo 97 (ISO 13616)."""
    text = text.replace(" ", "")
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(sign, 36)) for sign in text[4:] + text[:4])) % 97 == 1


def is_chinese_id(text):
    """Whether the check sign of an 18-digit Chinese identity number fits (GB 11643)."""
    total = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17].upper()


def is_address(text, before):
    """Whether four numbers with dots are the public IP address of a host, not a version, a section, an example."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or text.endswith((".0", ".255")):
        return False
    return max(map(int, text.split("."))) >= LEAST_OCTET and not LIKE_A_VERSION.search(before)


def _is_ipv6(text):
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return address.is_global


def _is_card(text, before):
    digits = re.sub(r"[ -]", "", text)
    if not CARD_PREFIX.match(digits) or not passes_luhn(digits) or len(set(digits)) < 4:
        return False
    return len(digits) < len(text) or bool(CARD_WORD.search(before))  # bare digits need a word beside them


def _is_token(text, before):
    return "EXAMPLE" not in text and len(set(text)) > 8


def _is_ssn(text, before):
    return SSN_WORD.search(before) and text[:3] not in ("000", "666")


def _is_phone(text, before):
    return 7 <= sum(map(str.isdigit, text)) <= 15


def mask_emails(text):
    """(text, count) with the e-mail addresses of persons as <EMAIL>."""
    parts, end, count, place = [], 0, 0, text.find("@")
    while place >= 0:
        local = LOCAL_PART.search(text, max(end, place - 64), place)
        domain = DOMAIN.match(text, place + 1) if local else None
        if domain and local.start() < place and _is_person(local.group(), domain.group(1), domain.group(2).lower()):
            parts += [text[end:local.start()], "<EMAIL>"]
            end, count = domain.end(), count + 1
        place = text.find("@", max(place + 1, end))
    return ("".join(parts) + text[end:], count) if count else (text, 0)


def _is_person(local, domain, top):
    if top not in GENERIC and top not in COUNTRIES or local.lower() in NOBODY:
        return False
    return not EXAMPLES.search(domain)


def mask_pattern(text, pattern, label, check=None):
    """(text, count) with the matches of a pattern that `check(match, 40 characters before it)` accepts as <label>."""
    count = 0

    def replace(found):
        nonlocal count
        if check and not check(found.group(), text[max(0, found.start() - 40):found.start()]):
            return found.group()
        count += 1
        return f"<{label}>"

    return pattern.sub(replace, text), count


class MaskPrivateData(DocumentEditor):
    """Replaces personal data and secrets by placeholders and counts them by type.

    Args:
        types: which of TYPES to look for; None: all. Phone numbers, cards and addresses are not looked for in
            mathematics, whose numbers look like anything.
    """

    name = "private_data"
    TYPES = ("email", "secret", "ip_address", "iban", "payment_card", "national_id", "phone")
    NOT_IN_MATHEMATICS = ("ip_address", "payment_card", "national_id", "phone")

    def __init__(self, types=None):
        super().__init__()
        unknown = set(types or ()) - set(self.TYPES)
        if unknown:
            raise ValueError(f"types={list(types)} names {sorted(unknown)[0]!r}; known types are "
                             f"{', '.join(self.TYPES)}")
        self.types = self.TYPES if types is None else tuple(types)

    def edit(self, document):
        counts, text = {}, document.text
        skipped = self.NOT_IN_MATHEMATICS if kind_of(document) == "mathematics" else ()
        for name in self.types:
            if name not in skipped:
                text, counts[name] = getattr(self, f"_mask_{name}")(text)
        document.text = text
        return counts

    def _mask_email(self, text):
        return mask_emails(text)

    def _mask_secret(self, text):
        total = 0
        if "PRIVATE KEY" in text:
            text, total = mask_pattern(text, PRIVATE_KEY, "PRIVATE_KEY")
        for sign, pattern in TOKENS.items():
            if sign in text:
                text, count = mask_pattern(text, pattern, "SECRET", _is_token)
                total += count
        return text, total

    def _mask_ip_address(self, text):
        text, four = mask_pattern(text, IPV4, "IP_ADDRESS", is_address)
        text, six = mask_pattern(text, IPV6, "IP_ADDRESS", lambda found, before: _is_ipv6(found))
        return text, four + six

    def _mask_iban(self, text):
        return mask_pattern(text, IBAN, "IBAN", lambda found, before: is_iban(found))

    def _mask_payment_card(self, text):
        return mask_pattern(text, CARD, "PAYMENT_CARD", _is_card)

    def _mask_national_id(self, text):
        text, chinese = mask_pattern(text, CHINESE_ID, "NATIONAL_ID", lambda found, before: is_chinese_id(found))
        text, american = mask_pattern(text, SSN, "NATIONAL_ID", _is_ssn)
        return text, chinese + american

    def _mask_phone(self, text):
        total = 0
        for pattern in PHONES:
            text, count = mask_pattern(text, pattern, "PHONE", _is_phone)
            total += count
        for pattern in PLAIN_PHONES:
            text, count = mask_pattern(text, pattern, "PHONE", lambda found, before: PHONE_WORD.search(before))
            total += count
        return text, total
