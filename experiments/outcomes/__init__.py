"""Small planted worlds for what the literature reports of crosscoders: does it happen here, too?"""
