"""Is this data what the configuration says it is?"""
