"""docs/reference, made from the code: commands, settings, metrics, SQL, protocols.

python -m taximeter.reference docs/reference           writes the pages (`make docs`)
python -m taximeter.reference --check docs/reference   exits 1 naming those that are not current (`make check`)
"""
